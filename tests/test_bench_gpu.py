"""The GPU benchmarks, rehearsed on the CPU: every step runs, every row is right, and a spent budget is respected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, **environment):
    command = [str(ROOT / "bench/gpu.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    done = run("--device", "cpu", "--tiny", "--results", results)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (folder,) = (path for path in results.iterdir() if path.is_dir())
    return folder


def test_every_step_of_the_rehearsal_leaves_right_rows(rehearsal):
    data = json.loads((rehearsal / "rows.json").read_text())
    assert set(data["sections"]) == {"layers", "models", "blocks", "factorization", "ranks"}
    rows = [row for section in data["sections"].values() for row in section]
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
    assert data["left out"] == []
    assert {"card", "torch", "triton", "revision", "TB/s"} <= set(data["about"])
    assert {row["way"] for row in data["sections"]["layers"]} == {"dense", "pair", "published", "pifa gather"}
    assert all(row["us"] > 0 and row["roof"] > 0 for row in data["sections"]["layers"])


def test_compressed_models_hold_fewer_bytes(rehearsal):
    rows = json.loads((rehearsal / "rows.json").read_text())["sections"]["models"]
    size = {row["way"]: row["linear GB"] for row in rows}
    assert size["pifa 0.55"] <= size["pifa 0.5625"] < size["dense"]
    assert size["pifa, r = w/2"] < size["pair, r = w/2"] < size["dense"]


def test_the_tables_hold_every_row(rehearsal):
    text = (rehearsal / "tables.md").read_text()
    data = json.loads((rehearsal / "rows.json").read_text())
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(tables) == sum(len(rows) + 1 for rows in data["sections"].values())


def test_a_budget_that_is_spent_leaves_steps_out_and_says_which(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.run", "--device", "cpu", "--tiny", "--seconds", "0"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    data = json.loads((folder / "rows.json").read_text())
    assert data["sections"] == {} and len(data["left out"]) == 10


def test_rows_are_drawn_afterwards(rehearsal, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "rows.json").write_text((rehearsal / "rows.json").read_text())
    command = [sys.executable, "-m", "bench.gpu.report", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 3  # two layers and one rank


def test_a_section_run_again_leaves_the_others_of_the_same_revision(rehearsal, tmp_path):
    shutil.copytree(rehearsal, tmp_path / rehearsal.name)
    path = tmp_path / rehearsal.name / "rows.json"
    before = json.loads(path.read_text())
    part = ("--device", "cpu", "--tiny", "--results", tmp_path, "--sections", "factorization")
    done = run(*part)
    assert done.returncode == 0 and "GPU tests were not run" in done.stdout, done.stdout + done.stderr
    after = json.loads(path.read_text())["sections"]
    assert after.keys() == before["sections"].keys() and after.pop("factorization")
    assert all(rows == before["sections"][name] for name, rows in after.items())
    path.write_text(json.dumps(before | {"about": before["about"] | {"revision": "another"}}))
    assert run(*part).returncode == 0
    assert json.loads(path.read_text())["sections"].keys() == {"factorization"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_says_so_and_does_nothing(tmp_path):
    done = run("--results", tmp_path)
    assert done.returncode == 0
    assert "no torch with a CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())
