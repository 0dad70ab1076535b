"""Formulas of cost, and the profile of a machine on disk."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pifa_compile
from pifa_compile import cost
from pifa_compile.factors import flop_per_token

MACHINE = cost.Profile("test", 1e10, {"float32": 1e11, "bfloat16": 2e11, "float16": 2e11}, 1e9, 1e-5)


@pytest.mark.parametrize("form", ["dense", "pair", "pifa"])
def test_flop_are_those_of_the_factors(form):
    N, m, n, r = 7, 48, 32, 12
    total = sum(int(step.flop.subs({cost.TOKENS: N, cost.M: m, cost.N_IN: n, cost.R: r})) for step in cost.STEPS[form])
    assert total == N * flop_per_token(form, m, n, r)


def test_bytes_count_every_operand_once():
    N, m, n, r = 7, 48, 32, 12
    values = {cost.TOKENS: N, cost.M: m, cost.N_IN: n, cost.R: r, cost.ITEM: 2}
    first, second, gather = (int(step.bytes.subs(values)) for step in cost.STEPS["pifa"])
    tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((N, n), (r, n), (N, r))]
    assert first == sum(t.nbytes for t in tensors)
    tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((N, r), (m - r, r), (N, m - r))]
    assert second == sum(t.nbytes for t in tensors)
    assert gather == 2 * torch.empty(N, m, dtype=torch.bfloat16).nbytes


def test_time_is_the_slower_of_bytes_and_flop_and_a_call():
    # One token: 4 MB of weight at 10 GB/s. Many tokens: 2 N m n at 100 GFLOP/s.
    one = cost.time("dense", 1, 1000, 1000, 0, torch.float32, MACHINE)
    assert one == pytest.approx((4e6 + 8e3) / 1e10 + 1e-5)
    many = cost.time("dense", 1000, 1000, 1000, 0, torch.float32, MACHINE)
    assert many == pytest.approx(2e9 / 1e11 + 1e-5)
    assert cost.roof("dense", 1000, 1000, 1000, 0, torch.float32, MACHINE) == pytest.approx(2e9 / 1e11)
    folded, plain = (cost.time(f, 1000, 1000, 1000, 500, torch.float32, MACHINE) for f in ("pifa folded", "pifa"))
    assert plain - folded == pytest.approx(1e6 / 1e9 - 8e6 / 1e10)


def test_calls_decide_small_layers_and_flop_large_ones():
    forms = ("dense", "pair", "pifa")
    assert cost.fastest(forms, 1, 32, 32, 8, torch.float32, MACHINE) == "dense"
    assert cost.fastest(forms, 512, 4096, 4096, 2048, torch.float32, MACHINE) == "pifa"


@pytest.fixture
def quick(monkeypatch):
    made = []

    def measure(device="cpu"):
        made.append(device)
        return cost.Profile(cost.device_name(device), 1e10, MACHINE.rates, 1e9, 1e-5)

    monkeypatch.setattr(cost, "measure_profile", measure)
    return made


def test_a_profile_is_measured_once_and_kept(quick, tmp_path):
    assert cost.profile(root=tmp_path, measure=False) is None and not quick
    first = cost.profile(root=tmp_path)
    assert cost.profile(root=tmp_path) == first == cost.profile(root=tmp_path, measure=False)
    assert len(quick) == 1
    assert first.device.endswith(f"{torch.get_num_threads()} threads")


@pytest.mark.parametrize("damage", ["", "[]", '{"version": 0}', "other device", "a field less"])
def test_a_profile_that_cannot_be_used_is_measured_again(damage, quick, tmp_path):
    cost.profile(root=tmp_path)
    (path,) = (tmp_path / "machines").iterdir()
    data = json.loads(path.read_text())
    if damage == "other device":
        damage = json.dumps(data | {"device": "another"})
    elif damage == "a field less":
        del data["call"]
        damage = json.dumps(data)
    path.write_text(damage)
    cost.profile(root=tmp_path)
    assert len(quick) == 2


def test_what_is_measured_is_possible():
    found = cost.measure_profile()
    assert found.bandwidth > 1e8 and 1e-8 < found.call < 1e-2 and found.gather > 1e6
    assert set(found.rates) == {"float32", "bfloat16", "float16"} and min(found.rates.values()) > 1e7


def test_the_dry_run_predicts_where_the_machine_is_known(quick):
    model, x = nn.Linear(64, 96), torch.randn(3, 5, 64)
    (row,) = pifa_compile.dry_run(model, x, options={"density": 0.5}).rows
    assert "ms_after" not in row
    profile = cost.profile()
    report = pifa_compile.dry_run(model, x, options={"density": 0.5})
    (row,) = report.rows
    assert row["ms_before"] == pytest.approx(1e3 * cost.time("dense", 15, 96, 64, 0, torch.float32, profile))
    assert row["ms_after"] == pytest.approx(1e3 * cost.time("pifa", 15, 96, 64, row["rank"], torch.float32, profile))
    assert "ms predicted" in str(report)
