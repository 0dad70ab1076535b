"""The pass that folds row orders into the columns of the layers that read the features."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from zoo import lower_rank_

import pifa_compile
from pifa_compile import Svd, backend, loaded
from pifa_compile.factors import PairFactors, PifaFactors
from pifa_compile.kernels import op
from pifa_compile.passes import pipeline
from pifa_compile.passes.fold import fold
from pifa_compile.recipes import Joint

GATHER = torch.ops.aten._unsafe_index.Tensor
HALF = torch.tensor(0.5)


class Mlp(nn.Module):
    """up -> something on single features -> down, with biases."""

    def __init__(self, between, n=24, inner=40) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(n, inner), nn.Linear(inner, n), between

    def forward(self, x):
        return self.down(self.between(self.up(x)))


class Gated(nn.Module):
    def __init__(self, n=24, inner=40, bias=True) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(n, inner, bias), nn.Linear(n, inner, bias)
        self.down = nn.Linear(inner, n, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate_proj(x)) * self.up_proj(x))


def run(model, *inputs, recipe=None, grad=False, **options):
    """Output, the graph, and the sites after all passes; compressed first."""
    pifa_compile.compress(model, recipe or Svd(density=0.6, rank_multiple=1), progress=False)
    seen = []

    def recording(gm, example_inputs):
        compiled = pifa_compile.pifa(gm, example_inputs, options={"inner": "eager", **options})
        seen.append(gm)
        return compiled

    with torch.set_grad_enabled(grad):
        y = torch.compile(model, backend=recording)(*inputs)
    return y, seen[-1].graph


def exact(model):
    """The compressed model itself, dense layers made of its factors, in float64: what the fold must reproduce."""
    return pifa_compile.restore_(pifa_compile.apply_(model)).double()


def gathers(graph):
    return sum(n.target in (GATHER, torch.index_select) for n in graph.nodes)


@pytest.mark.parametrize(
    "between",
    [
        torch.relu,
        F.gelu,
        lambda h: 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.04 * torch.pow(h, 3.0)))),
        lambda h: F.dropout(F.hardswish(h), 0.5, training=False),
        lambda h: h.view(-1, h.shape[-1]).relu().view(h.shape),
        lambda h: h.relu_(),
        lambda h: F.silu(h) + h / 2,
        lambda h: h * HALF,
    ],
)
def test_the_order_moves_through_operations_on_single_features(between, relative):
    model, x = Mlp(between), torch.randn(2, 5, 24)
    y, graph = run(model, x)
    assert gathers(graph) == 1  # of the second layer, whose output somebody reads in order
    assert relative(y, exact(model)(x.double())) < 1e-6


@pytest.mark.parametrize(
    "between",
    [
        lambda h: torch.softmax(h, -1),
        lambda h: h + h.flip(-1),
        lambda h: h * torch.arange(40.0),
        lambda h: h * torch.arange(40.0).view(4, 10).reshape(40),
        lambda h: h.cumsum(-1),
        lambda h: F.layer_norm(h, (40,)),
        lambda h: h.reshape(-1, 20).relu().view(h.shape),
        lambda h: h - h.mean(-1, keepdim=True),
        lambda h: h * h[..., :1],
    ],
)
def test_what_sees_more_than_single_features_keeps_the_order(between, relative):
    model, x = Mlp(between), torch.randn(2, 5, 24)
    y, graph = run(model, x)
    assert gathers(graph) == 2
    assert relative(y, exact(model)(x.double())) < 1e-6


def test_features_that_the_model_returns_keep_their_order(relative):
    class Both(Mlp):
        def forward(self, x):
            h = torch.relu(self.up(x))
            return self.down(h), h

    model, x = Both(None), torch.randn(3, 24)
    (y, h), graph = run(model, x)
    assert gathers(graph) == 2
    wanted = exact(model)(x.double())
    assert relative(y, wanted[0]) < 1e-6 and relative(h, wanted[1]) < 1e-6


def test_gate_and_up_write_slices_in_an_order_in_common(relative):
    model, x = Gated(), torch.randn(2, 5, 24)
    y, graph = run(model, x)
    assert gathers(graph) == 1  # the output of down
    assert relative(y, exact(model)(x.double())) < 1e-6


def test_the_third_layer_that_writes_is_gathered(relative):
    class Three(Gated):
        def __init__(self):
            super().__init__()
            self.third = nn.Linear(24, 40)

        def forward(self, x):
            return self.down(F.silu(self.gate_proj(x)) * self.up_proj(x) * torch.tanh(self.third(x)))

    model, x = Three(), torch.randn(2, 5, 24)
    y, graph = run(model, x)
    assert gathers(graph) == 2
    assert relative(y, exact(model)(x.double())) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_gate_and_up_that_were_factored_together(bias, relative):
    model, x = Gated(bias=bias), torch.randn(2, 5, 24)
    y, graph = run(model, x, recipe=Joint(density=0.6, rank_multiple=1))
    assert sum(n.target is F.linear for n in graph.nodes) == 4
    assert gathers(graph) == (3 if bias else 1)  # a bias that is added behind the operator keeps its order
    assert not [n for n in graph.nodes if n.target == "narrow"]
    assert relative(y, exact(model)(x.double())) < 1e-6


def test_a_pair_on_either_side_takes_the_order_too(monkeypatch, relative):
    model, x = Gated(), torch.randn(2, 5, 24)
    loaded_factors = backend.shared_factors

    def as_pair(store, record, *where):
        factors = loaded_factors(store, record, *where)
        if record.name == "gate_proj":
            return factors
        left = factors.weight() @ torch.linalg.pinv(factors.pivot_rows.double())
        return PairFactors(left.float(), factors.pivot_rows)

    monkeypatch.setattr(backend, "shared_factors", as_pair)
    y, graph = run(model, x)
    assert gathers(graph) == 0  # neither gate, in whose order all is, nor the pairs
    assert relative(y, exact(model)(x.double())) < 1e-5


def test_sizes_of_the_features_are_not_the_features(relative):
    """Where the number of tokens changes, the graph reads all sizes from the tensor whose order moves."""
    model, x = Mlp(lambda h: h.view(-1, 40).relu().view(h.size())), torch.randn(2, 5, 24)
    torch._dynamo.mark_dynamic(x, (0, 1))
    y, graph = run(model, x)
    assert any(n.target == "size" for n in graph.nodes) and gathers(graph) == 1
    assert relative(y, exact(model)(x.double())) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_of_a_low_rank_pair_takes_the_order_with_its_bias(bias, relative):
    """Both biases of the pair were folded into one, which belongs to no parameter."""

    class Low(Mlp):
        def __init__(self):
            super().__init__(torch.relu)
            self.up = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 40, bias))

    model, x = Low(), torch.randn(2, 5, 24)
    lower_rank_(model.down)
    report = pifa_compile.compress(nn.Sequential(model.down), Svd(density=0.9, rank_multiple=1), progress=False)
    options, seen = {"inner": "eager", "run": report.run.run_id}, []

    def recording(gm, example_inputs):
        compiled = pifa_compile.pifa(gm, example_inputs, options=options)
        seen.append(gm.graph)
        return compiled

    with torch.no_grad():
        y = torch.compile(model, backend=recording)(x)
        assert counters["pifa"]["replaced"] == 2 and gathers(seen[0]) == 1
        assert relative(y, model.double()(x.double())) < 1e-5


def test_a_bias_that_changes_is_not_served_stale(relative):
    model, x = Mlp(torch.relu), torch.randn(3, 24)
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False)
    compiled = torch.compile(model, backend="pifa", options={"inner": "eager"})
    with torch.no_grad():
        compiled(x)
        model.up.bias.add_(1.0)
        y = compiled(x)
        y = compiled(x)
    assert relative(y, exact(model)(x.double())) < 1e-6


def test_a_bias_that_wants_a_gradient_gets_it():
    model, x = Mlp(torch.relu), torch.randn(3, 24)
    y, _ = run(model, x, grad=True, allow_grad=True)
    y.square().sum().backward()
    assert model.up.bias.grad is not None
    found = model.up.bias.grad.clone()
    dense = pifa_compile.restore_(pifa_compile.apply_(model))
    dense.up.bias.requires_grad_(True)
    dense.zero_grad()
    dense(x).square().sum().backward()
    assert torch.allclose(found, dense.up.bias.grad, rtol=1e-4, atol=1e-4)


def test_a_prepared_layer_keeps_its_order():
    model, x = Mlp(torch.relu), torch.randn(3, 24)
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False)
    prepared = pifa_compile.apply_(model)
    seen = []

    def recording(gm, example_inputs):
        compiled = pifa_compile.pifa(gm, example_inputs, options={"inner": "eager"})
        seen.append(gm)
        return compiled

    with torch.no_grad():
        y = torch.compile(prepared, backend=recording)(x)
        assert torch.allclose(y, prepared(x), atol=1e-6)
    assert gathers(seen[0].graph) == 2


def test_graphs_compiled_again_share_what_was_folded():
    model = Gated()
    buffers = []
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False)

    def recording(gm, example_inputs):
        compiled = pifa_compile.pifa(gm, example_inputs, options={"inner": "eager"})
        buffers.append({t.data_ptr() for _, t in gm.named_buffers() if t.dim() == 2})
        return compiled

    compiled = torch.compile(model, backend=recording, dynamic=False)
    with torch.no_grad():
        compiled(torch.randn(2, 24))
        compiled(torch.randn(3, 24))
    assert len(buffers) == 2 and buffers[0] == buffers[1]


def test_bfloat16_and_autocast(relative):
    for half in (False, True):
        torch.compiler.reset()
        model = Gated().bfloat16() if half else Gated()
        x = torch.randn(4, 24, dtype=torch.bfloat16 if half else torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not half):
            y, graph = run(model, x)
        assert y.dtype == torch.bfloat16 and gathers(graph) == 1
        wanted = exact(model)(x.double())
        assert relative(y, wanted) < 3e-2


def test_the_permutation_is_exact():
    """Integers leave nothing to rounding: the folded graph gives the very numbers of the unfolded one."""
    torch.manual_seed(3)
    n, inner, r = 8, 12, 4

    def factors(m, k):
        order = torch.randperm(m).to(torch.int32)
        return PifaFactors(torch.randint(-3, 4, (r, k)).float(), torch.randint(-3, 4, (m - r, r)).float(), order)

    up, down = factors(inner, n), factors(n, inner)
    x = torch.randint(-3, 4, (5, n)).float()
    h = torch.relu(op.reference(x, up.pivot_rows, up.coefficients, up.row_order))
    wanted = op.reference(h, down.pivot_rows, down.coefficients, down.row_order)
    order = up.row_order
    arange = torch.arange(inner, dtype=torch.int32)
    folded = torch.relu(op.reference(x, up.pivot_rows, up.coefficients, arange))
    assert torch.equal(folded, h[:, order])
    assert torch.equal(op.reference(folded, down.pivot_rows[:, order], down.coefficients, down.row_order), wanted)


def test_reasons_are_told(monkeypatch):
    results = []

    def spy(gm, context):
        results.append(fold(gm, context))
        return results[-1]

    steps = tuple(replace(step, run=spy) if step.name == "fold" else step for step in pipeline.PIPELINE)
    monkeypatch.setattr(pipeline, "PIPELINE", steps)
    run(Mlp(lambda h: torch.softmax(h, -1)), torch.randn(2, 24))
    assert results[0].changed == 0
    assert dict(results[0].skipped)["up"].startswith("softmax")


def test_a_layer_that_is_called_twice_keeps_one_set_of_columns(relative):
    class Twice(Mlp):
        def forward(self, x):
            return self.up(torch.relu(self.up(x)))

    model, x = Twice(None, 24, 24), torch.randn(2, 24)
    y, graph = run(model, x)
    assert gathers(graph) == 2
    assert relative(y, exact(model)(x.double())) < 1e-6


def test_derived_tensors_are_made_once_and_let_go():
    made = []

    def make():
        made.append(1)
        return torch.zeros(3)

    source = torch.randn(4)
    first = loaded.derived("test", [source], make)
    assert loaded.derived("test", [source.clone()], make) is first  # by content
    assert loaded.derived("other", [source], make) is not first
    del first
    loaded.derived("test", [source], make)
    assert len(made) == 3


def test_a_dump_shows_the_fold(tmp_path):
    run(Gated(), torch.randn(2, 24), dump=tmp_path / "dump")
    (folder,) = (tmp_path / "dump").iterdir()
    assert "aten._unsafe_index" not in (folder / "fold.after.py").read_text()
    assert json.loads((folder / "linears.json").read_text())["linears"][0]["state"] == "pifa"
