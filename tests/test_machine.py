"""The profile of this machine: measured once, kept on disk, read by the dry run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pifa_compile
from pifa_compile import cost, machine
from pifa_compile.kernels import few_tokens

RATES = {"float32": {1: 1e10, 512: 1e11}, "bfloat16": {1: 2e10, 512: 2e11}, "float16": {1: 2e10, 512: 2e11}}


@pytest.fixture
def quick(monkeypatch):
    made = []

    def measure(device="cpu"):
        made.append(device)
        return cost.Profile(machine.device_name(device), 1e10, RATES, 1e9, 1e-5)

    monkeypatch.setattr(machine, "measure_profile", measure)
    return made


def test_a_profile_is_measured_once_and_kept(quick, tmp_path):
    assert machine.profile(root=tmp_path, measure=False) is None and not quick
    first = machine.profile(root=tmp_path)
    assert machine.profile(root=tmp_path) == first == machine.profile(root=tmp_path, measure=False)
    assert len(quick) == 1
    assert first.device.endswith(f"{torch.get_num_threads()} threads")


HOSTILE = {
    "no speed": {"bandwidth": 0.0},
    "a word": {"gather": "fast"},
    "a dtype less": {"rates": {"float32": {1: 1e10}, "float16": {1: 1e10}}},
    "no rates": {"rates": RATES | {"float32": {}}},
    "no tokens": {"rates": RATES | {"float32": {0: 1e10, 512: 1e11}}},
    "a negative rate": {"rates": RATES | {"float32": {1: -1e10}}},
}
DAMAGE = ["", "[]", '{"version": 0}', "[" * 20_000, " " * 100_000, "other device", "a field less", *HOSTILE]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage[:20])
def test_a_profile_that_cannot_be_used_is_measured_again(damage, quick, tmp_path):
    machine.profile(root=tmp_path)
    (path,) = (tmp_path / "machines").iterdir()
    data = json.loads(path.read_text())
    if damage == "other device":
        damage = json.dumps(data | {"device": "another"})
    elif damage == "a field less":
        del data["call"]
        damage = json.dumps(data)
    elif damage in HOSTILE:
        damage = json.dumps(data | HOSTILE[damage])
    path.write_text(damage)
    machine.profile(root=tmp_path)
    assert len(quick) == 2


def test_what_is_measured_is_possible():
    found = machine.measure_profile()
    assert found.bandwidth > 1e8 and 1e-8 < found.call < 1e-2 and found.gather > 1e6
    assert set(found.rates) == {"float32", "bfloat16", "float16"}
    assert all(min(rates.values()) > 1e7 and list(rates) == sorted(rates) for rates in found.rates.values())


def test_the_dry_run_predicts_where_the_machine_is_known(quick):
    model, x = nn.Linear(64, 96), torch.randn(26, 5, 64)  # more than are few in float32 anywhere
    (row,) = pifa_compile.dry_run(model, x, options={"density": 0.5}).rows
    assert "ms_after" not in row
    profile = machine.profile()
    report = pifa_compile.dry_run(model, x, options={"density": 0.5})
    (row,) = report.rows
    assert row["ms_before"] == pytest.approx(1e3 * cost.time("dense", 130, 96, 64, 0, "float32", profile))
    assert row["ms_after"] == pytest.approx(1e3 * cost.time("pifa", 130, 96, 64, row["rank"], "float32", profile))
    assert "ms predicted" in str(report)
    if few_tokens.available(torch.float32):
        (row,) = pifa_compile.dry_run(model, x[0, :1], options={"density": 0.5}).rows
        few = cost.time(cost.FEW_TOKENS, 1, 96, 64, row["rank"], "float32", profile)
        assert row["ms_after"] == pytest.approx(1e3 * few)
