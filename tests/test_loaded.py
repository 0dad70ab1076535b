"""Factors are in memory once, for as long as somebody holds them."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from pifa_compile import apply_, loaded, pifa, restore_
from pifa_compile.compression import compress
from pifa_compile.errors import DamagedError
from pifa_compile.factors import PairFactors, PifaFactors
from pifa_compile.loaded import derived, shared_factors
from pifa_compile.passes import replace as replacing
from pifa_compile.recipes import Joint, Svd
from pifa_compile.store import LayerRecord, Store, objects
from pifa_compile.store.objects import object_path

CPU = torch.device("cpu")


@pytest.fixture
def reads(monkeypatch):
    """The digests of the objects that were read from a store, in order."""
    found, read = [], objects.read_object

    def counting(root, digest, *arguments):
        found.append(digest)
        return read(root, digest, *arguments)

    monkeypatch.setattr(objects, "read_object", counting)
    return found


def put(store, factors):
    known = {"name": "a", "digests": {}, "shape": factors.shape, "form": factors.form, "rank": factors.rank}
    size = {"numbers": factors.numbers, "bytes": factors.nbytes, "seconds": 0.0}
    return LayerRecord(object=store.put_factors(factors), **known, **size)


@pytest.fixture(params=["pifa", "wide", "pair", "bias"])
def factors(request):
    order = torch.randperm(6, dtype=torch.int32)
    pifa = PifaFactors(torch.randn(2, 5), torch.randn(4, 2), order, y_scale=0.25)
    return {
        "pifa": pifa,
        "wide": PifaFactors(torch.randn(6, 9), torch.randn(0, 6), order),
        "pair": PairFactors(torch.randn(6, 2), torch.randn(2, 5)),
        "bias": PifaFactors(**pifa.tensors(), bias=torch.randn(6)),
    }[request.param]


def test_every_caller_gets_the_same_tensors(store, reads, factors):
    record = put(store, factors)
    first = shared_factors(store, record, torch.float32, CPU)
    second = shared_factors(Store(store.root), record, torch.float32, CPU)
    assert second is first
    assert len(reads) == 1
    assert {name: t.tolist() for name, t in first.tensors().items()} == {
        name: t.tolist() for name, t in factors.tensors().items()
    }


def test_whoever_holds_the_matrices_alone_keeps_them_loaded(store, reads, factors):
    """As a compiled graph does."""
    record = put(store, factors)
    loaded = shared_factors(store, record, torch.float32, CPU)
    held = {name: t for name, t in loaded.tensors().items() if t.dim() == 2 and t.numel()}
    del loaded
    again = shared_factors(store, record, torch.float32, CPU)
    assert len(reads) == 1
    assert all(again.tensors()[name] is t for name, t in held.items())
    assert getattr(again, "y_scale", 1.0) == getattr(factors, "y_scale", 1.0)
    torch.testing.assert_close(again.weight(), factors.weight())


def test_nobody_is_served_what_is_gone(store, reads, factors):
    record = put(store, factors)
    for count in (1, 2):
        shared_factors(store, record, torch.float32, CPU)
        assert len(reads) == count


def test_memory_is_given_back(store, factors):
    loaded = shared_factors(store, put(store, factors), torch.float32, CPU)
    seen = [weakref.ref(t) for t in loaded.tensors().values() if t.dim() == 2 and t.numel()]
    assert [ref() is None for ref in seen] == [False] * (1 if factors.rank == 6 else 2)
    del loaded
    assert all(ref() is None for ref in seen)


def test_another_dtype_or_store_is_another_entry(store, tmp_path, reads, factors):
    other = Store(tmp_path / "other")
    put(other, factors)
    record = put(store, factors)
    held = [shared_factors(s, record, d, CPU) for s in (store, other) for d in (torch.float32, torch.bfloat16)]
    assert [f.dtype for f in held] == [torch.float32, torch.bfloat16] * 2
    assert len({id(f) for f in held}) == len(reads) == 4


def test_what_is_damaged_is_not_loaded(store, factors):
    record = put(store, factors)
    path = object_path(store.root, record.object)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError):
        shared_factors(store, record, torch.float32, CPU)


class Siblings(nn.Module):
    """Two layers that share their first product, and a third into whose columns the order of both goes."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return self.down(torch.relu(self.gate(x)) * self.up(x))


MODELS = {
    "apart": lambda: nn.Sequential(nn.Linear(32, 32), nn.Softmax(-1), nn.Linear(32, 48)),
    "folded": lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 40)),
    "grouped": Siblings,
}


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["pifa", "pair"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_recompilation_reads_nothing_again(reads, name, form, inner, tmp_path):
    model = MODELS[name]().eval()
    compress(model, Svd(density=0.5, form=form), progress=False)
    compiled = torch.compile(model, backend="pifa", dynamic=False, options={"inner": inner})
    seen = []
    for _ in range(2):
        for size in (3, 5, 7):
            x = torch.linspace(-1, 1, size * 32).view(size, 32)
            seen.append(compiled(x))
            gc.collect()
    layers = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert len(reads) == layers
    assert torch._dynamo.utils.counters["pifa"]["replaced"] == 3 * layers
    assert all(torch.equal(first, again) for first, again in zip(seen[:3], seen[3:], strict=True))
    exact = restore_(apply_(model)).double()
    for y, size in zip(seen, (3, 5, 7), strict=False):
        torch.testing.assert_close(y.double(), exact(torch.linspace(-1, 1, size * 32).view(size, 32).double()))
    del compiled
    torch.compiler.reset()
    gc.collect()
    own = str(tmp_path / "store")
    assert not any(other.alive for key, other in loaded._LOADED.items() if key[0] == own)


class Apart(nn.Module):
    """Two layers of one factorization that read different things, so that each runs alone."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(32, 48), nn.Linear(32, 48)

    def forward(self, x):
        return torch.softmax(self.q(x), -1) + self.k(2 * x)


@pytest.mark.parametrize("form", ["pifa", "pair"])
@torch.no_grad()
def test_a_layer_that_runs_alone_is_a_part_of_what_was_read(reads, form, tmp_path):
    """And not a copy: so all of it is there for a recompilation."""
    model = Apart().eval()
    compress(model, Joint(density=0.5, form=form, joint=("q+k",)), progress=False)
    graphs = []

    def backend(gm, inputs):
        call = pifa(gm, inputs, options={"inner": "eager"})
        graphs.append(gm)
        return call

    compiled = torch.compile(model, backend=backend, dynamic=False)
    exact = restore_(apply_(copy.deepcopy(model))).double()
    reads.clear()
    for size in (3, 5, 7):
        x = torch.linspace(-1, 1, size * 32).view(size, 32)
        assert torch.allclose(compiled(x).double(), exact(x.double()), atol=1e-5)
        gc.collect()
    assert len(reads) == 1 and len(graphs) == 3
    left = "coefficients" if form == "pifa" else "left"
    parts = [t for gm in graphs for name, t in gm.named_buffers() if name.startswith(f"pifa_{left}")]
    assert len(parts) == 6 and len({t.untyped_storage().data_ptr() for t in parts}) == 1
    del compiled, parts
    graphs.clear()
    torch.compiler.reset()
    gc.collect()
    own = str(tmp_path / "store")
    assert not any(other.alive for key, other in loaded._LOADED.items() if key[0] == own)


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 3], [5], [0, 2, 3], [1, 5], []])
def test_rows_that_are_scattered_are_copied_and_others_are_not(places):
    coefficients, at = torch.randn(6, 4), torch.tensor(places, dtype=torch.int64)
    rows = replacing._rows_of(coefficients, at)
    assert torch.equal(rows, coefficients[at])
    shared = rows.untyped_storage().data_ptr() == coefficients.untyped_storage().data_ptr()
    assert shared == (places in ([0, 1, 2], [2, 3], [5]))
    assert replacing._rows_of(coefficients, at.clone()) is rows


def test_what_is_made_again_is_what_was_read(reads, store):
    """By way of two tensors that were derived one of the other, and of which the first is gone as well."""
    given = PifaFactors(torch.randn(2, 5), torch.randn(4, 2), torch.randperm(6, dtype=torch.int32), y_scale=0.25)
    record, order = put(store, given), torch.randperm(5)

    def derive():
        factors = shared_factors(store, record, torch.float32, CPU)
        rows = factors.pivot_rows
        columns = derived("c", [rows, order], lambda: rows[:, order], [lambda t: t[:, torch.argsort(order)].clone()])
        both = derived("s", [columns], lambda: torch.cat([columns, columns]), [lambda t: t[:2].clone()])
        return factors.coefficients, both

    held = derive()
    again = shared_factors(store, record, torch.float32, CPU)
    assert len(reads) == 1
    assert all(torch.equal(t, given.tensors()[name]) for name, t in again.tensors().items())
    assert again.y_scale == 0.25
    del again, held
    gc.collect()
    shared_factors(store, record, torch.float32, CPU)
    assert len(reads) == 2
    derived("other", [torch.ones(1)], lambda: torch.ones(2))
    derived("another", [torch.ones(1)], lambda: torch.ones(3))
    assert str(store.root) not in repr(loaded._DERIVED_OF), "the ways back go with the tensors"
