"""The dry run: what would be done and why, and nothing done."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Store, Svd
from pifa_compile.factors import flop_per_token, numbers

HERE = Path(__file__).parent


def load_block() -> torch.nn.Module:
    """The block of tests/models, from a module that Dynamo can import."""
    spec = importlib.util.spec_from_file_location("golden_block", HERE / "models" / "block.py")
    module = sys.modules["golden_block"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Block()


@pytest.fixture
def block(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    counters.clear()
    torch.manual_seed(0)
    return load_block().eval()


def test_golden_plan_for_a_density_without_a_run(block, tmp_path, golden):
    report = pifa_compile.dry_run(block, torch.randn(2, 48), options={"density": 0.5})
    golden("dry_run.txt", f"{report}\n")
    assert report.planned and report.graphs == 1
    assert not (tmp_path / "store").exists()
    assert counters["pifa"]["factored"] == counters["pifa"]["replaced"] == 0


def test_the_plan_is_what_the_compression_then_does(block):
    planned = pifa_compile.dry_run(block, torch.randn(2, 48), options={"density": 0.5})
    options = {"density": 0.5, "calibrate": "none", "inner": "eager"}
    with torch.no_grad():
        torch.compile(block, backend="pifa", options=options)(torch.randn(2, 48))
    (run,) = Store().runs()
    assert [r["rank"] for r in planned.rows if r["rank"]] == [r.rank for r in run.layers]
    done = pifa_compile.dry_run(block, torch.randn(2, 48), options={"density": 0.5})
    assert not done.planned and done.run == run.run_id
    assert [r["numbers_after"] for r in done.rows] == [r["numbers_after"] for r in planned.rows]


def test_rows_are_json_and_count_as_the_arithmetic_says(block):
    pifa_compile.compress(block, Svd(density=0.5), progress=False)
    data = json.loads(json.dumps(pifa_compile.dry_run(block, torch.randn(2, 48)).to_json()))
    up = data["linears"][0]
    assert up["name"] == "up" and up["state"] == "pifa" and up["source"].startswith("block.py:")
    assert up["numbers_after"] == numbers("pifa", 96, 48, up["rank"])
    assert up["flop_after"] == flop_per_token("pifa", 96, 48, up["rank"])
    head = data["linears"][2]
    assert head["state"] == "dense" and "output embedding" in head["reason"]
    assert head["flop_after"] == head["flop_before"] == 2 * 48 * 64


def test_every_graph_of_a_model_with_graph_breaks_is_seen(block):
    def forward(x):
        y = block.up(x)
        torch._dynamo.graph_break()
        return block.down(y)

    report = pifa_compile.dry_run(forward, torch.randn(2, 48), options={"density": 0.5})
    assert report.graphs == 2 and [r["state"] for r in report.rows] == ["pifa", "pifa"]


def test_what_the_user_has_compiled_stays_compiled(block):
    x, graphs = torch.randn(2, 48), []
    compiled = torch.compile(block, backend=lambda gm, _: graphs.append(gm) or gm.forward)
    with torch.no_grad():
        compiled(x)
        for _ in range(12):  # more often than Dynamo's limit of recompilations
            report = pifa_compile.dry_run(block, x, options={"density": 0.5})
            assert report.graphs == 1
        compiled(x)
    assert len(graphs) == 1


def test_what_the_dense_weights_take_beside_the_factors_is_told(block):
    x, dense = torch.randn(2, 48), 4 * 2 * 96 * 48
    report = pifa_compile.dry_run(block, x, options={"density": 0.5})
    assert report.dense_bytes == report.to_json()["dense_bytes"] == dense
    assert f"{dense / 1e6:.2f} MB of their dense weights stay in memory" in str(report)
    pifa_compile.compress(block, Svd(density=0.5, skip=("down",)), progress=False)
    assert pifa_compile.dry_run(block, x).dense_bytes == dense / 2
    prepared = pifa_compile.dry_run(pifa_compile.apply_(block), x)
    assert prepared.dense_bytes == 0 and "stay in memory" not in str(prepared)


def test_a_weight_in_several_graphs_is_counted_once(block):
    def forward(x):
        y = block.up(x)
        torch._dynamo.graph_break()
        return block.up(x) + y

    report = pifa_compile.dry_run(forward, torch.randn(2, 48), options={"density": 0.5})
    assert len(report.rows) == 2 and report.dense_bytes == 4 * 96 * 48
