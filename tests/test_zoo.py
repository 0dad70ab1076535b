"""Many architectures end to end: as many layers replaced as there are, every other with its true reason, equal outputs.

The models, and what is expected of each, are in ``zoo``.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo import ZOO, Species, linear_parameters, lower_rank_

import pifa_compile
from pifa_compile import Svd, backend

#: Models that are compiled in bfloat16 in every test run, one of each make; the others in the long one.
BOTH_DTYPES = ("llama", "gpt2", "falcon", "mixtral", "mamba2", "bert", "t5", "whisper", "vit", "siglip")
#: Outputs in float32, relative to the dense model's.
EXACT = 1e-4
#: Outputs in bfloat16: how much further from those in float32 than the dense model's. Factors are exact; the product
#: between is rounded to 8 bits once more, and a sum of two such has as much error again.
ROUNDED = 2.5e-2


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Witness:
    """The backend, and what it did with every graph: the plans, and the weights that left the graphs.

    inner  as in the backend's options
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, inner: str, store: Path) -> None:
        self.plans: list[Any] = []
        self.gone: dict[int, Tensor] = {}
        self._options = {"inner": inner, "store": store}
        run_passes = backend.run_passes

        def watch(gm, context, **settings):
            self.plans.append(context.plan)
            return run_passes(gm, context, **settings)

        monkeypatch.setattr(backend, "run_passes", watch)

    def __call__(self, gm, inputs):
        before = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        compiled = pifa_compile.pifa(gm, inputs, options=self._options)
        left = set(gm.graph.find_nodes(op="placeholder"))
        self.gone |= {id(t): t for node, t in before.items() if node not in left}
        return compiled

    def reasons(self) -> list[str]:
        return [site.reason for plan in self.plans for site in plan.sites if site.reason is not None]


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """All tensors of floating point that a call gives."""
    found = model(**inputs)
    leaves = torch.utils._pytree.tree_leaves(found.to_tuple() if hasattr(found, "to_tuple") else found)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error over the outputs, Frobenius norms in float64."""
    assert [t.shape for t in found] == [t.shape for t in wanted] and wanted
    pairs = [(f.double(), w.double()) for f, w in zip(found, wanted, strict=True)]
    return max(float((f - w).norm() / w.norm().clamp_min(1e-12)) for f, w in pairs)


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()}


def share_of(parameters: dict[int, Tensor], model: nn.Module) -> float:
    """Which part of the numbers of the model's linear parameters is in ``parameters``."""
    own = {id(p): p for _, p in linear_parameters(model)}
    return sum(p.numel() for key, p in own.items() if key in parameters) / sum(p.numel() for p in own.values())


def as_expected(reasons: list[str], species: Species) -> bool:
    """Whether the reasons are those of the species, each as often as it says."""
    found = Counter(next((word for word in species.skipped if word in reason), reason) for reason in reasons)
    assert found == Counter(species.skipped)
    return True


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo with what it gives, compressed at its true ranks into a store of its own."""

    species: Species
    model: nn.Module
    store: Path
    exact: list[Tensor]


@pytest.fixture(scope="module", params=ZOO)
def specimen(request, tmp_path_factory):
    species, store = ZOO[request.param], tmp_path_factory.mktemp("store")
    model = species.make()
    exact = outputs(model, species.inputs())  # the first call of some models sets up what Dynamo cannot follow
    pifa_compile.compress(model, Svd(density=0.95, rank_multiple=1), store=store, progress=False)
    return Specimen(species, model, store, exact)


def check_transparent(specimen: Specimen, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, reasons, the share of what was replaced, and outputs."""
    species, model = specimen.species, specimen.model
    witness = Witness(monkeypatch, inner, specimen.store)
    found = outputs(torch.compile(model, backend=witness, fullgraph=True), species.inputs())
    assert distance(found, specimen.exact) < EXACT
    assert as_expected(witness.reasons(), species)
    wanted = {"replaced": species.replaced, "skipped": sum(species.skipped.values())}
    wanted["matched"] = sum(wanted.values())
    assert {key: counters["pifa"][key] for key in wanted} == wanted
    assert share_of(witness.gone, model) >= species.share


class Half:
    """A specimen in bfloat16: what it gives, and what it gives in float32 with the same weights."""

    def __init__(self, specimen: Specimen) -> None:
        self.specimen, self.model = specimen, copy.deepcopy(specimen.model).to(torch.bfloat16)
        self.inputs = cast(specimen.species.inputs(), torch.bfloat16)
        self.dense = outputs(self.model, self.inputs)
        self.exact = outputs(copy.deepcopy(self.model).float(), cast(self.inputs, torch.float32))

    def check(self, model: Any) -> None:
        """Dtypes as those of the dense model, and no more than a product's rounding further from float32."""
        found = outputs(model, self.inputs)
        assert [t.dtype for t in found] == [t.dtype for t in self.dense]
        assert distance(found, self.exact) < distance(self.dense, self.exact) + ROUNDED


def test_transparent(specimen, monkeypatch):
    check_transparent(specimen, "eager", monkeypatch)


def test_prepared(specimen):
    """In both dtypes, as modules of their own."""
    model = copy.deepcopy(specimen.model)
    dense = {id(p): p for _, p in linear_parameters(model)}
    prepared = pifa_compile.apply_(model, store=specimen.store)
    left = {id(p) for p in prepared.parameters()}
    gone = sum(p.numel() for key, p in dense.items() if key not in left)
    assert gone >= specimen.species.share * sum(p.numel() for p in dense.values())
    assert distance(outputs(prepared, specimen.species.inputs()), specimen.exact) < EXACT
    half = Half(specimen)
    half.check(pifa_compile.apply_(half.model, store=specimen.store))


@pytest.mark.parametrize("name", [n if n in BOTH_DTYPES else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_transparent_in_bfloat16(name, store):
    species = ZOO[name]
    model = species.make()
    pifa_compile.compress(model, Svd(density=0.95, rank_multiple=1), progress=False)
    half = Half(Specimen(species, model, store.root, []))
    half.check(torch.compile(half.model, backend="pifa", options={"inner": "eager"}))
    assert counters["pifa"]["replaced"] == species.replaced


@pytest.mark.slow
def test_through_inductor(specimen, monkeypatch):
    check_transparent(specimen, "inductor", monkeypatch)


class Convolutions(nn.Module):
    """A small residual net: bottlenecks of 1x1 convolutions around a 3x3 and a depthwise one, a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.down, self.up = nn.Conv2d(32, 24, 1), nn.Conv2d(24, 48, 1, bias=False)
        self.middle, self.depthwise = nn.Conv2d(24, 24, 3, padding=1, stride=2), nn.Conv2d(24, 24, 1, groups=24)
        self.shortcut = nn.Conv2d(32, 48, 1, stride=2)
        self.norm, self.mix, self.head = nn.BatchNorm2d(48), nn.Conv1d(48, 40, 1), nn.Linear(40, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.up(torch.relu(self.depthwise(torch.relu(self.middle(torch.relu(self.down(x)))))))
        y = torch.relu(self.norm(y + self.shortcut(x)))
        return self.head(self.mix(y.flatten(2)).mean(-1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolutional_net(memory_format, store, monkeypatch):
    torch.manual_seed(0)
    model = Convolutions().eval()
    lower_rank_(model)
    model, x = model.to(memory_format=memory_format), torch.randn(2, 3, 8, 8).to(memory_format=memory_format)
    report = pifa_compile.compress(model, Svd(density=0.95, rank_multiple=1), progress=False)
    assert [r.name for r in report.run.layers if r.object] == ["down", "up", "mix", "head"]
    witness = Witness(monkeypatch, "eager", store.root)
    with torch.no_grad():
        exact = [model(x)]
        assert distance([torch.compile(model, backend=witness, fullgraph=True)(x)], exact) < EXACT
        assert sorted(witness.reasons()) == ["1x1 convolution with groups 24", "1x1 convolution with stride (2, 2)"]
        assert counters["pifa"]["replaced"] == 4
        assert distance([pifa_compile.apply_(model)(x)], exact) < EXACT


def test_there_are_enough_kinds():
    """The table is data: nobody may empty it without being seen."""
    assert len(ZOO) >= 45 and len({species.model for species in ZOO.values()}) == len(ZOO)
    assert all(species.replaced >= 2 for species in ZOO.values())
    assert [name for name, species in ZOO.items() if species.share < 0.95] == ["siglip"]
