"""How ``pifa::linear`` is spelled out on CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

import pifa_compile
from pifa_compile import Svd, _torch, backend
from pifa_compile.factors import PifaFactors
from pifa_compile.kernels import few_tokens, merge, native
from pifa_compile.kernels.few_tokens import most_tokens
from pifa_compile.modules import PifaLinear
from pifa_compile.passes.decompose import FEW_RUNS, GROUPS, group_size, runs_of


@pytest.mark.parametrize("group", GROUPS)
def test_aligned_groups_are_seen(group):
    groups = torch.randperm(6)
    positions = (groups[:, None] * group + torch.arange(group)).flatten()
    assert group_size(positions) == group


def test_what_is_no_aligned_group():
    assert group_size(torch.randperm(64)) == 1
    assert group_size(torch.arange(60).roll(30)) == 1  # of no multiple of 8
    shifted = torch.cat([torch.arange(4, 64), torch.arange(4)])  # runs of 8, but not aligned
    assert group_size(shifted) == 1
    swapped = torch.arange(64)
    swapped[[0, 1]] = swapped[[1, 0]]  # one pair out of order in an otherwise aligned order
    assert group_size(swapped) == 1


def test_pivots_first_in_ascending_order_need_no_gather():
    def factors(order):
        return PifaFactors(torch.randn(2, 5), torch.randn(4, 2), torch.tensor(order, dtype=torch.int32))

    assert runs_of(factors([0, 1, 2, 3, 4, 5]).gather_order, 2) == [(0, 2), (2, 6)]
    assert runs_of(factors([1, 0, 2, 3, 4, 5]).gather_order, 2) == [(1, 2), (0, 1), (2, 6)]
    assert runs_of(factors([2, 3, 0, 1, 4, 5]).gather_order, 2) == [(2, 4), (0, 2), (4, 6)]
    assert runs_of(torch.arange(3), 3) == [(0, 3)]


def graph_of(model, x, **options):
    """The output of a model without a compiler, and the graph that the passes leave."""
    graphs = []

    def recording(gm, example_inputs):
        compiled = pifa_compile.pifa(gm, example_inputs, options={"inner": "eager", **options})
        graphs.append(gm.graph)
        return compiled

    with torch.no_grad():
        y = torch.compile(model, backend=recording)(x)
    return y, graphs[0]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [2, 3, 0, 1, 4, 5], [4, 5, 0, 1, 2, 3], [5, 1, 0, 2, 4, 3]])
def test_rows_in_few_runs_are_slices_side_by_side(order, relative, applied):
    made = PifaFactors(torch.randn(2, 5), torch.randn(4, 2), torch.tensor(order, dtype=torch.int32))
    x = torch.randn(3, 5)
    y, graph = graph_of(PifaLinear(made), x)
    assert relative(y, applied(made, x)) < 1e-6
    gathers = [n for n in graph.nodes if n.target in (_torch.unchecked_index(), torch.index_select)]
    assert bool(gathers) == (len(runs_of(made.gather_order, 2)) > FEW_RUNS)


def test_aligned_groups_are_gathered_as_one(relative, applied):
    groups, size = torch.randperm(8), GROUPS[-1]
    order = (groups[:, None] * size + torch.arange(size)).flatten().to(torch.int32)
    made = PifaFactors(torch.randn(24, 16), torch.randn(40, 24), order)
    assert len(runs_of(made.gather_order, 24)) > FEW_RUNS
    bias, x = torch.randn(64), torch.randn(2, 3, 16)
    y, graph = graph_of(PifaLinear(made, bias), x)
    assert relative(y, applied(made, x) + bias.double()) < 1e-6
    (gather,) = (n for n in graph.nodes if n.target is torch.index_select)
    assert gather.args[2].meta["example_value"].shape == (8,)


class Cut(nn.Module):
    """A layer, and what somebody does with its output."""

    def __init__(self, layer, then) -> None:
        super().__init__()
        self.layer, self.then = layer, then

    def forward(self, x):
        return self.then(self.layer(x))


CUTS = {
    "some rows": lambda y: y.narrow(-1, 3, 20),
    "all rows": lambda y: y.narrow(-1, 0, 40),
    "a row": lambda y: y.narrow(-1, 7, 1),
    "from the end": lambda y: y.narrow(-1, -5, 3),
    "a start that is no number": lambda y: y.narrow(-1, torch.tensor(3), 8),
    "by keywords": lambda y: y.narrow(dim=-1, start=3, length=8),
    "a keyword": lambda y: y.narrow(-1, 3, length=8),
    "tokens": lambda y: y.narrow(0, 1, 2),
}


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_rows_that_somebody_takes_out_of_a_prepared_layer(cut, scattered, relative, applied, tmp_path):
    """Of rows that keep their order in both parts, a cut reads slices of these."""
    made, x = free_layer(40, 24, 10), torch.randn(3, 24)
    if scattered:
        made = replace(made, row_order=torch.randperm(40).to(torch.int32))
    y, _ = graph_of(Cut(PifaLinear(made), CUTS[cut]), x, dump=tmp_path)
    assert relative(y, CUTS[cut](applied(made, x))) < 1e-6
    (table,) = tmp_path.glob("*/linears.json")
    (row,) = json.loads(table.read_text())["linears"]
    assert (row["state"], row["shape"], row["numbers_after"]) == ("pifa", [40, 24], made.numbers)


@pytest.mark.parametrize("inner", [torch.float32, torch.float16])
def test_a_prepared_layer_under_autocast(inner, relative, applied):
    """In the dtype of autocast; coefficients of another dtype than the pivot rows keep theirs."""
    made = free_layer(64, 48, 24)
    made = replace(made, coefficients=made.coefficients.to(inner), y_scale=1.0 if inner == torch.float32 else 0.5)
    model, x = PifaLinear(made, torch.randn(64)), torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, graph = graph_of(model, x)
        wanted = model(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, wanted) < 1e-2 and relative(y, applied(made, x) + model.bias.double()) < 2e-2
    rounded = {n.args[1] for n in graph.nodes if n.target is torch.ops.aten.to.dtype}
    assert (inner in rounded) == (inner == torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pivot_group", [1, 8])
def test_every_dtype_and_order_through_inductor(dtype, pivot_group, relative, applied, store):
    model = nn.Linear(32, 64).to(dtype)
    recipe = Svd(density=0.6, rank_multiple=8, pivot_group=pivot_group)
    pifa_compile.compress(model, recipe, progress=False)
    x = torch.randn(2, 3, 32, dtype=dtype)
    factors = pifa_compile.apply_(nn.Sequential(model))[0].factors()
    assert group_size(factors.gather_order) == pivot_group
    with torch.no_grad():
        y = torch.compile(model, backend="pifa")(x)
    wanted = applied(factors, x) + model.bias.double()
    assert y.dtype == dtype
    assert relative(y, wanted) < {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]


def test_a_wide_layer_of_full_rank_and_one_token(relative, applied):
    model, x = nn.Linear(48, 8, bias=False), torch.randn(48)
    pifa_compile.compress(model, Svd(density=0.99, rank_multiple=1), progress=False)
    factors = pifa_compile.apply_(nn.Sequential(model))[0].factors()
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", options={"inner": "eager"})(x)
    assert relative(y, applied(factors, x)) < 1e-6


# --- kernels of ours -------------------------------------------------------------------------------------------------


def compiled_with(model, x, *, transform=None, dynamic=False, grad=False, **options):
    """The output of a model through Inductor, and the names of the operators of ours in the graph that it was given."""
    found = []
    original = backend._compile_inner

    def recording(gm, inputs, settings):
        found.extend(n.target.name() for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        return original(gm, inputs, settings)

    with mock.patch.object(backend, "_compile_inner", recording), torch.set_grad_enabled(grad):
        run = torch.compile(transform(model) if transform else model, backend="pifa", dynamic=dynamic, options=options)
        y = run(x)
    return y, [name for name in found if name.startswith("pifa::")]


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def free_layer(m=256, n=192, r=96, dtype=torch.float32):
    """A layer whose pivots may be anywhere, sorted as pivoting leaves them."""
    order = torch.randperm(m)
    order = torch.cat([order[:r].sort().values, order[r:].sort().values]).to(torch.int32)
    return PifaFactors(torch.randn(r, n).div(n**0.5).to(dtype), torch.randn(m - r, r).div(r**0.5).to(dtype), order)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_few_tokens_are_one_call(dtype, relative, applied):
    most = most_tokens(256, 192, 96, dtype)
    if not most:
        pytest.skip(f"no instructions for {dtype} here")
    made = free_layer(dtype=dtype)
    for tokens in (most, most + 1):
        x = torch.randn(1, tokens, 192).to(dtype)
        y, found = compiled_with(PifaLinear(made), x)
        assert (found == ["pifa::few_tokens"]) == (tokens == most)
        assert relative(y, applied(made, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_features_are_merged(dtype, relative, applied):
    if not merge.available(dtype):
        pytest.skip(f"no instructions for {dtype} here")
    made, bias = free_layer(dtype=dtype), torch.randn(256).to(dtype)
    x = torch.randn(2, 256, 192).to(dtype)
    y, found = compiled_with(PifaLinear(made, bias), x)
    assert found == ["pifa::merge"]
    assert relative(y, applied(made, x) + bias.double()) < (1e-6 if dtype == torch.float32 else 1e-2)
    y, found = compiled_with(PifaLinear(free_layer()), torch.randn(most_tokens(256, 192, 96, torch.float32) + 1, 192))
    assert found == []  # too little to pay for a call


def test_packed_weights_win_with_fewer_tokens(relative, applied):
    packed, plain = ({t: most_tokens(256, 192, 96, t, packed=p) for t in TOLERANCE} for p in (True, False))
    dtype = next((t for t in TOLERANCE if packed[t] < plain[t]), None)
    if dtype is None:
        pytest.skip("no difference on this processor")
    made, most = free_layer(dtype=dtype), packed[dtype]
    assert most > 0
    for tokens in (most, most + 1):
        x = torch.randn(tokens, 192).to(dtype)
        y, found = compiled_with(PifaLinear(made), x, freezing=True)
        assert (found == ["pifa::few_tokens"]) == (tokens == most)
        assert relative(y, applied(made, x)) < TOLERANCE[dtype]


def test_an_unknown_number_of_tokens_is_never_few(relative, applied):
    made = free_layer()
    x = torch.randn(3, 192)
    y, found = compiled_with(PifaLinear(made), x, dynamic=True)
    assert "pifa::few_tokens" not in found and relative(y, applied(made, x)) < 1e-6


def test_kernels_without_gradients_stay_out_of_graphs_with_them(relative, applied):
    made, x = free_layer(), torch.randn(2, 256, 192, requires_grad=True)
    for given in (x, x[:, :1]):
        y, found = compiled_with(PifaLinear(made), given, grad=True)
        assert found == [] and relative(y.detach(), applied(made, given.detach())) < 1e-6
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    batched, found = compiled_with(PifaLinear(made), x.detach(), transform=torch.func.vmap)
    assert found == [] and relative(batched, applied(made, x.detach())) < 1e-6


def test_a_machine_without_a_compiler_takes_slower_forms(monkeypatch, caplog, relative, applied):
    def no_compiler(source):
        raise OSError("no g++ here")

    monkeypatch.setattr(_torch, "compile_cpp", no_compiler)
    for cached in (native.begin, few_tokens._kernel, merge._kernel):
        monkeypatch.setattr(sys.modules[cached.__module__], cached.__name__, cached.__wrapped__)
    made, x = free_layer(), torch.randn(2, 192)
    y, _ = compiled_with(PifaLinear(made), x)
    assert relative(y, applied(made, x)) < 1e-6
    assert "no g++ here" in caplog.text and "slower" in caplog.text
    y, _ = compiled_with(PifaLinear(made), torch.randn(2, 1024, 192).fill_(0.5))
    assert y.isfinite().all()  # whatever the graph was promised before the compiler failed
