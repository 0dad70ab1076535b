"""The graph passes: what is found, what is written instead, and what a dump shows of it."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd, _torch
from pifa_compile.factors import PifaFactors
from pifa_compile.kernels import op
from pifa_compile.modules import PifaLinear
from pifa_compile.passes import dump
from pifa_compile.passes.pipeline import PIPELINE
from pifa_compile.passes.plan import cast

HERE = Path(__file__).parent
GATHER = torch.ops.aten._unsafe_index.Tensor


def load_block() -> torch.nn.Module:
    """The block of tests/models, from a module that Dynamo can import."""
    spec = importlib.util.spec_from_file_location("golden_block", HERE / "models" / "block.py")
    module = sys.modules["golden_block"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Block()


@pytest.fixture
def block(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    torch._dynamo.reset()
    counters.clear()
    model = load_block().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / 8)
    return model


def capture(model, *inputs, **options):
    """The graph that the passes leave, and the compiled function's output."""
    seen = []

    def backend(gm, example_inputs):
        compiled = pifa_compile.pifa(gm, example_inputs, options={"inner": "eager", **options})
        seen.append(gm)
        return compiled

    with torch.no_grad():
        y = torch.compile(model, backend=backend)(*inputs)
    return seen[0].graph, y


def targets(graph):
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_the_pipeline_reads_in_order_and_only_its_end_rewrites():
    names = [step.name for step in PIPELINE]
    assert names.index("detect") < names.index("lookup") < names.index("replace") < names.index("tidy")
    rewrites = [step.rewrites for step in PIPELINE]
    assert rewrites == sorted(rewrites)


def test_on_cpu_the_operator_is_spelled_out_and_the_dense_linears_are_gone(block):
    graph, _ = capture(block, torch.randn(3, 48), density=0.5)
    assert targets(graph).count(F.linear) == 2 * 2 + 1  # two factored layers, one dense head
    assert targets(graph).count(GATHER) == 1  # the order of `up` is in the columns of `down`
    assert torch.ops.pifa.linear.default not in targets(graph)
    weights = [n.name for n in graph.find_nodes(op="placeholder") if "weight" in n.name]
    assert len(weights) == 1 and "lm_head" in weights[0]


def test_every_new_node_has_the_user_s_own_line(block):
    graph, _ = capture(block, torch.randn(3, 48), density=0.5)
    new = [n for n in graph.nodes if n.op == "call_function" and n.target in (F.linear, torch.cat, GATHER)]
    assert len(new) == 8
    assert all("block.py" in n.meta["stack_trace"] for n in new)


def test_a_pair_is_two_linears_and_no_gather(block):
    pifa_compile.compress(block, Svd(density=0.5, form="pair"), progress=False)
    graph, y = capture(block, torch.randn(3, 48))
    assert targets(graph).count(F.linear) == 5
    assert GATHER not in targets(graph)
    assert counters["pifa"]["replaced"] == 2
    assert torch.isfinite(y).all()


class Odd(nn.Module):
    """Linears whose weights are no plain parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(96, 32))
        self.register_buffer("constant", torch.randn(32, 32))
        self.good = nn.Linear(32, 32)

    def forward(self, x, given):
        return F.linear(x, self.fused[:32]) + F.linear(x, self.constant) + F.linear(x, given) + self.good(x)


def test_a_linear_that_is_left_alone_says_why(block, tmp_path):
    x = torch.randn(2, 32)
    capture(Odd(), x, torch.randn(32, 32), density=0.5, dump=tmp_path / "dump")
    (table,) = (tmp_path / "dump").glob("*/linears.json")
    rows = json.loads(table.read_text())["linears"]
    reasons = [row["reason"] for row in rows]
    assert "part or view of the parameter fused" in reasons[0]
    assert "plain tensor" in reasons[1] and "plain tensor" in reasons[2]
    assert reasons[3] is None and rows[3]["state"] == "pifa"
    assert all(row["source"].startswith("test_passes.py:") for row in rows)


def test_autocast_keeps_the_dtype_of_every_output(block):
    x = torch.randn(4, 48)
    for inside in (True, False):
        torch._dynamo.reset()

        def forward(x, inside=inside):
            if not inside:
                return block(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return block(x)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            _, y = capture(forward, x, density=0.9)
        assert y.dtype == torch.bfloat16


# --- dumps -----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return text.replace(str(HERE), "tests")


def test_golden_dump_of_a_graph(block, tmp_path, golden):
    pifa_compile.compress(block, Svd(density=0.5, rank_multiple=4), progress=False)
    capture(block, torch.randn(3, 48), dump=tmp_path / "dump")
    (folder,) = (tmp_path / "dump").iterdir()
    steps = {"replace", "fold", "decompose", "tidy"}
    wanted = {f"{s}.{part}" for s in steps for part in ("before.py", "after.py", "ops.txt")}
    assert {p.name for p in folder.iterdir()} == wanted | {"linears.txt", "linears.json", "graph.html"}
    for name in ("replace.before.py", "replace.after.py", "tidy.after.py", "decompose.ops.txt"):
        golden(f"dump.{name}", plain((folder / name).read_text()))
    lines = (folder / "linears.txt").read_text().splitlines()
    rows = json.loads((folder / "linears.json").read_text())["linears"]
    assert [r["error"] is None or r["error"] < 1e-5 for r in rows] == [True] * 3
    golden("dump.linears.txt", "\n".join(without_error(lines[:5], rows)) + "\n")


def test_a_dump_tells_what_dense_weights_stay_in_memory(block, tmp_path):
    pifa_compile.compress(block, Svd(density=0.5), progress=False)
    capture(block, torch.randn(3, 48), dump=tmp_path / "dense")
    capture(pifa_compile.apply_(block), torch.randn(3, 48), dump=tmp_path / "prepared")
    dense, prepared = (next((tmp_path / name).iterdir()) for name in ("dense", "prepared"))
    assert json.loads((dense / "linears.json").read_text())["dense_bytes"] == 4 * 2 * 96 * 48
    assert "\n0.04 MB of their dense weights stay in memory" in (dense / "linears.txt").read_text()
    assert json.loads((prepared / "linears.json").read_text())["dense_bytes"] == 0
    assert "stay in memory" not in (prepared / "linears.txt").read_text()


def without_error(lines, rows):
    """Rounding errors differ in their last digit between machines."""
    for row in rows:
        if row["error"] is not None:
            lines = [line.replace(f"{row['error']:.1e}", "  ERROR") for line in lines]
    return lines


def test_no_dump_writes_nothing(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capture(block, torch.randn(3, 48), density=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"store"}


def test_the_dump_directory_may_come_from_the_environment(block, tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_DUMP", str(tmp_path / "from environment"))
    capture(block, torch.randn(3, 48), density=0.5)
    assert list((tmp_path / "from environment").glob("*/linears.txt"))


def test_the_dumped_graph_runs_as_python(block, tmp_path):
    capture(block, torch.randn(3, 48), density=0.5, dump=tmp_path / "dump")
    (text,) = (tmp_path / "dump").glob("*/tidy.after.py")
    compile(text.read_text(), str(text), "exec")


def test_artifacts_reach_the_structured_trace(block, monkeypatch):
    seen = {}
    monkeypatch.setattr(_torch, "tracing", lambda: True)
    monkeypatch.setattr(_torch, "trace_artifact", lambda name, encoding, payload: seen.update({name: payload()}))
    capture(block, torch.randn(3, 48), density=0.5)
    assert "linear" in seen["pifa_replace.before.py"]
    assert json.loads(seen["pifa_linears.json"])["linears"][0]["name"] == "up"


def test_logs_by_the_name_of_the_package(block, caplog):
    with caplog.at_level(logging.DEBUG, logger="pifa_compile"):
        capture(block, torch.randn(3, 48), density=0.5)
    assert "2 of 3 linear layers replaced" in caplog.text
    assert "MB" in caplog.text  # the dense copy that stays
    assert "replace: matched 3, changed 2" in caplog.text


def test_nothing_is_rendered_that_nobody_wants(block, monkeypatch):
    """To write a graph as text takes longer than many a pass."""
    monkeypatch.setattr(_torch, "tracing", lambda: False)
    for name in ("readable", "op_counts", "plan_rows", "Snapshot"):
        monkeypatch.delattr(dump, name)
    graph, _ = capture(block, torch.randn(3, 48), density=0.5)
    assert counters["pifa"]["replaced"] == 2 and GATHER in targets(graph)


def test_a_node_of_unknown_value_is_cast_to_one():
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = cast(graph, x, torch.bfloat16)
    assert (made.target, made.args, made.meta) == ("to", (x, torch.bfloat16), {})


class Scaled(nn.Module):
    """The operator with pivot rows that are computed for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = PifaLinear(PifaFactors(torch.randn(8, 24), torch.randn(24, 8), torch.randperm(32).int()))

    def forward(self, x, scale):
        f = self.factors
        return op.linear(x, f.pivot_rows * scale, f.coefficients, f.row_order)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_an_operator_on_factors_that_are_no_parameters_stays_as_it_is(inner, store):
    model, given = Scaled(), (torch.randn(3, 24), torch.tensor(0.5))
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", options={"inner": inner})(*given)
        assert torch.allclose(y, model(*given), atol=1e-5)
    assert counters["pifa"]["matched"] == 1 and counters["pifa"]["replaced"] == 0
