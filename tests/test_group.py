"""The pass that gives sibling layers one first product."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pifa_compile
from pifa_compile import Svd
from pifa_compile.recipes import Joint

HERE = Path(__file__).parent


class Siblings(nn.Module):
    """Three layers of different sizes over one input."""

    def __init__(self, n=24, sizes=(24, 16, 36), bias=True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias) for m in sizes)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def compressed(model):
    """Compress it; returns what it then is, as dense layers made of the factors, in float64."""
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False)
    return pifa_compile.restore_(pifa_compile.apply_(copy.deepcopy(model))).double()


def run(model, *inputs, dynamic=None, **options):
    """Outputs, and the graphs after all passes."""
    seen = []

    def recording(gm, example_inputs):
        compiled = pifa_compile.pifa(gm, example_inputs, options={"inner": "eager", **options})
        seen.append(gm)
        return compiled

    compiled = torch.compile(model, backend=recording, dynamic=dynamic)
    with torch.no_grad():
        return [compiled(x) for x in inputs], seen


def linears(gm):
    return [n for n in gm.graph.nodes if n.target is F.linear]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)])
def test_siblings_share_their_first_product(shape, bias, relative):
    model, x = Siblings(bias=bias), torch.randn(shape)
    wanted = compressed(model)(x.double())
    (found,), (gm,) = run(model, x)
    assert len(linears(gm)) == 1 + 3
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-6
        assert one.is_contiguous()
    # AOTAutograd keeps no graph with a method of a node whose value it does not know.
    methods = [n for n in gm.graph.nodes if n.op == "call_method"]
    assert all("example_value" in n.args[0].meta for n in methods)


def test_parts_of_a_first_product_are_multiplied_as_matrices(relative):
    model, x = Siblings(), torch.randn(2, 3, 24)
    wanted = compressed(model)(x.double())
    (found,), (gm,) = run(model, x, dynamic=True)
    flat = [n for n in linears(gm) if n.args[0].target is torch.flatten]
    assert len(flat) == 3  # ATen multiplies a slice with more dimensions batch by batch
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-6


def test_ranks_may_differ_and_layers_without_siblings_stay_apart(relative):
    class Chain(Siblings):
        def forward(self, x):
            a, b, c = super().forward(x)
            return b + self.last(a), c

    model, x = Chain(), torch.randn(5, 24)
    model.last = nn.Linear(24, 16)
    wanted = compressed(model)(x.double())
    (found,), (gm,) = run(model, x)
    assert len(linears(gm)) == 1 + 3 + 2
    assert all(relative(one, other) < 1e-6 for one, other in zip(found, wanted, strict=True))


def test_layers_that_were_factored_together_are_one_sibling(relative):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(24, m) for m in (24, 16, 16))

        def forward(self, x):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    model, x = Attention(), torch.randn(2, 5, 24)
    pifa_compile.compress(model, Joint(density=0.6, rank_multiple=1, joint=("q+k",)), progress=False)
    exact = pifa_compile.restore_(pifa_compile.apply_(copy.deepcopy(model))).double()
    (found,), (gm,) = run(model, x)
    assert len(linears(gm)) == 1 + 2
    assert all(relative(one, other) < 1e-6 for one, other in zip(found, exact(x.double()), strict=True))
    assert all(y.is_contiguous() for y in found)


def test_an_input_that_is_changed_between_them_keeps_them_apart(relative):
    class Changing(Siblings):
        def forward(self, x):
            x = x * 2
            a = self.layers[0](x)
            x.add_(1.0)
            return a, self.layers[1](x)

    model, x = Changing(), torch.randn(5, 24)
    wanted = compressed(model)(x.double())
    (found,), (gm,) = run(model, x)
    assert len(linears(gm)) == 4
    assert all(relative(one, other) < 1e-6 for one, other in zip(found, wanted, strict=True))


def test_under_autocast_the_casts_of_one_input_are_one_input(relative):
    model, x = Siblings(), torch.randn(5, 24)
    wanted = compressed(model)(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,), (gm,) = run(model, x)
    assert len(linears(gm)) == 4
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16 and relative(one, other) < 3e-2


def test_layers_with_equal_factors_keep_their_own_buffers(relative):
    """A buffer that two passes want is registered once: a second name for it must not be given to the next one."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.alone, self.last = (nn.Linear(24, 24, bias=False) for _ in range(4))

        def forward(self, x):
            y = torch.softmax(self.first(x) + self.second(x), -1)
            return self.last(torch.softmax(self.alone(y), -1))

    model, x = Chain(), torch.randn(5, 24)
    with torch.no_grad():
        model.second.weight.copy_(-model.first.weight)
        model.alone.weight.copy_(2 * model.first.weight)  # powers of two: the same order of rows
    wanted = compressed(model)(x.double())
    (found,), (gm,) = run(model, x)
    names = [n.target for n in gm.graph.find_nodes(op="get_attr")]
    assert len({id(getattr(gm, name)) for name in names}) == len(set(names))
    assert relative(found, wanted) < 1e-6


def test_prepared_layers_stay_apart(relative):
    model, x = Siblings(), torch.randn(5, 24)
    compressed(model)
    prepared = pifa_compile.apply_(model)
    (found,), (gm,) = run(prepared, x)
    assert len(linears(gm)) == 6
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, prepared(x), strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_prepared_layers_that_were_factored_together_share_their_first_product(bias, relative):
    model, x = Siblings(bias=bias), torch.randn(3, 24)
    pifa_compile.compress(model, Joint(density=0.6, rank_multiple=1, joint=("0+1",)), progress=False)
    prepared = pifa_compile.apply_(model)
    wanted = [y.detach().double() for y in copy.deepcopy(prepared).double()(x.double())]
    (found,), (gm,) = run(prepared, x)
    assert len(linears(gm)) == (1 + 2) + 2, "the third layer has factors of its own"
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-6


def test_the_stack_takes_the_place_of_its_parts_and_is_shared_by_all_graphs():
    model = Siblings()
    compressed(model)
    _, graphs = run(model, torch.randn(2, 24), torch.randn(3, 24), dynamic=False)
    assert len(graphs) == 2
    for gm in graphs:
        rows = [t for name, t in gm.named_buffers() if "pivot_rows" in name]
        assert len(rows) == 1
    kept = [{name: t.data_ptr() for name, t in gm.named_buffers() if t.dim() == 2} for gm in graphs]
    assert set(kept[0].values()) == set(kept[1].values())


def test_the_parts_are_let_go():
    model = Siblings()
    compressed(model)
    _, (gm,) = run(model, torch.randn(2, 24))
    gc.collect()
    held = {t.data_ptr() for _, t in gm.named_buffers()}
    rank = {t.shape[1] for name, t in gm.named_buffers() if "coefficients" in name}
    others = [
        o
        for o in gc.get_objects()
        if type(o) is torch.Tensor and o.dim() == 2 and o.shape[1] == 24 and o.shape[0] in rank
    ]
    assert not [o for o in others if o.data_ptr() not in held]


def test_inductor_gives_the_same_numbers(relative):
    model, x = Siblings(), torch.randn(5, 24)
    wanted = compressed(model)(x.double())
    with torch.no_grad():
        found = torch.compile(model, backend="pifa")(x)
    assert all(relative(one, other) < 1e-6 for one, other in zip(found, wanted, strict=True))


def gated():
    """The block of tests/models, from a module that Dynamo can import."""
    spec = importlib.util.spec_from_file_location("golden_gated", HERE / "models" / "gated.py")
    module = sys.modules["golden_gated"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Gated().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 8)
    return model


def test_golden_graphs_of_fold_and_group(tmp_path, golden, relative):
    model, x = gated(), torch.randn(3, 32)
    pifa_compile.compress(model, Svd(density=0.5, rank_multiple=4), progress=False)
    (found,), _ = run(model, x, dump=tmp_path / "dump")
    (folder,) = (tmp_path / "dump").iterdir()
    for name in ("fold.before.py", "fold.after.py", "group.after.py"):
        golden(f"gated.{name}", (folder / name).read_text().replace(str(HERE), "tests"))
    exact = pifa_compile.restore_(pifa_compile.apply_(model)).double()
    assert relative(found, exact(x.double())) < 1e-6
