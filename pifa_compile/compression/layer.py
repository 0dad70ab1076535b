"""What every walk over the layers of a model shares: which layers there are, run ids, factors, progress."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pifa_compile import _torch
from pifa_compile.digest import cast_digests
from pifa_compile.factors import numbers, rank_for_density, rank_for_numbers
from pifa_compile.layers import LinearWeight, as_matrix, is_plain, supported_dtype
from pifa_compile.pivoting import Factorized, LowRank, factorize
from pifa_compile.recipes import Recipe
from pifa_compile.store import LayerRecord, Member, RunHeader, RunWriter, timestamp


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight to be walked, with its digests ({} where it has no content) and what sets it apart: a reason to leave
    it dense, or an override of the recipe. ``names`` are those of all modules that hold a weight of this content."""

    weight: LinearWeight
    digests: dict[str, str]
    reason: str | None
    override: Mapping[str, Any]
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.weight.name or "weight"

    @property
    def key(self) -> frozenset[tuple[str, str]] | str:
        """What this layer and its record share, and no other layer: the content; the name where there is none."""
        return content(self.digests) or self.name

    @property
    def free(self) -> bool:
        """Whether its rank follows from the density that all layers keep together."""
        return self.reason is None and not self.override

    @property
    def identity(self) -> Any:
        """What makes its factors, beside the recipe, as JSON: the weight, and what was found under its name."""
        own = self.digests.get(_torch.dtype_name(self.weight.parameter.dtype), self.name)
        return own if self.free else [own, "dense" if self.reason else dict(self.override)]

    @property
    def matrix(self) -> Tensor:
        """The weight as an m x n matrix, a view."""
        return as_matrix(self.weight.parameter, self.weight.layout)

    def record(self, **facts: Any) -> LayerRecord:
        """The layer's record: dense unless ``facts`` say otherwise."""
        m, n = self.weight.shape
        known = {"name": self.name, "digests": self.digests, "shape": (m, n), "layout": self.weight.layout}
        dense = {"object": None, "form": "dense", "rank": 0, "numbers": m * n, "bytes": self.weight.parameter.nbytes}
        return LayerRecord(**known | dense | {"seconds": 0.0} | facts)


@dataclass(frozen=True, eq=False)
class Unit:
    """Layers whose stacked rows share one factorization; mostly a single layer."""

    layers: tuple[Layer, ...]

    @property
    def first(self) -> Layer:
        return self.layers[0]

    @property
    def name(self) -> str:
        """The layer's name, or those of all: "block.q_proj+k_proj"."""
        own = [layer.name.rpartition(".")[2] for layer in self.layers[1:]]
        return "+".join([self.first.name, *own])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), m that of all rows."""
        return sum(layer.weight.shape[0] for layer in self.layers), self.first.weight.shape[1]

    @property
    def sizes(self) -> list[int]:
        """m of each layer."""
        return [layer.weight.shape[0] for layer in self.layers]

    @property
    def matrix(self) -> Tensor:
        """The stacked weight, m x n; a view where it is one layer's."""
        return self.first.matrix if len(self.layers) == 1 else torch.cat([layer.matrix for layer in self.layers])

    def record(self, **facts: Any) -> LayerRecord:
        """The record of the factors that all layers share."""
        if len(self.layers) == 1:
            return self.first.record(**facts)
        members = tuple(Member(layer.name, layer.digests, layer.weight.shape[0]) for layer in self.layers)
        stacked = {"name": self.name, "shape": self.shape, "digests": {}, "members": members}
        return self.first.record(**facts | stacked)

    def dense(self, reason: str) -> list[LayerRecord]:
        """Records that leave every layer dense."""
        return [layer.record(reason=reason) for layer in self.layers]


def can_join(layers: Sequence[Layer]) -> bool:
    """Whether layers can be stacked: of one width and layout, with a common density, none with a twin elsewhere."""
    alike = {(layer.weight.shape[1], layer.weight.layout, layer.weight.parameter.dtype) for layer in layers}
    return len(alike) == 1 and all(layer.free and len(layer.names) == 1 for layer in layers)


def layers_done(records: Iterable[LayerRecord]) -> dict[Any, LayerRecord]:
    """The record of each layer, by what the layer and it share; one record for all layers of a unit."""
    return {content(digests) or name: record for record in records for name, digests in record.layers}


def distinct_layers(weights: Sequence[LinearWeight], recipe: Recipe) -> list[Layer]:
    """Layers in order, those with the same content once.

    A graph cannot tell equal weights apart, so all of them stay dense if one must.
    """
    found: dict[frozenset[tuple[str, str]] | str, Layer] = {}
    for weight in weights:
        parameter = weight.parameter.detach()
        plain = is_plain(parameter) and supported_dtype(parameter.dtype)
        reason = weight.reason or recipe.reason_to_skip(weight.name)
        reason = reason or (None if plain else "the weight is no plain floating point tensor")
        digests = cast_digests(parameter) if plain else {}
        layer = Layer(weight, digests, reason, recipe.override_for(weight.name))
        first = found.get(layer.key, layer)
        if first.reason is None and reason is not None:
            first = replace(first, reason=f"{reason} ({layer.name} has the same content)")
        found[layer.key] = replace(first, names=(*first.names, weight.name))
    return list(found.values())


def content(digests: dict[str, str]) -> frozenset[tuple[str, str]]:
    """The digests as a key: a weight and its cast to another dtype have some in common, but not all."""
    return frozenset(digests.items())


def unused_name(name: str, names: Collection[str]) -> str:
    """``name``, numbered if it is one of ``names``: a graph may call several weights the same."""
    number, found = 1, name
    while found in names:
        number += 1
        found = f"{name}#{number}"
    return found


# --- runs ------------------------------------------------------------------------------------------------------------


def run_id(recipe: Recipe, weights: Sequence[Any], calibration: dict[str, Any] | None = None) -> str:
    """The id that this recipe on these weights always gets, so that a repeated or interrupted run is found again."""
    identity = {"recipe": recipe.to_json(), "weights": list(weights), "calibration": calibration}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"{recipe.method}-{recipe.density:g}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run_header(
    recipe: Recipe,
    layers: Sequence[Layer],
    model: str,
    revision: str | None = None,
    calibration: dict[str, Any] | None = None,
) -> RunHeader:
    """The header of a run that begins now; its id is the same whenever recipe, weights and calibration are."""
    return RunHeader(
        run_id=run_id(recipe, [layer.identity for layer in layers], calibration),
        model=model,
        revision=revision,
        recipe=recipe.to_json(),
        calibration=calibration,
        seed=recipe.seed,
        versions=versions(),
        created=timestamp(),
        layers_planned=len(layers),
    )


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    names = ("pifa-compile", "torch", "scipy")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # a source tree on PYTHONPATH


# --- factors ---------------------------------------------------------------------------------------------------------


class Truncatable(Protocol):
    """A fitted weight that can be cut at any rank up to ``rank``."""

    @property
    def rank(self) -> int: ...

    def truncate(self, r: int) -> LowRank: ...


def override_rank(layer: Layer, recipe: Recipe) -> int:
    """The rank that a layer's override asks for."""
    m, n = layer.weight.shape
    if "rank" in layer.override:
        return int(layer.override["rank"])
    own = layer.override["density"]
    wanted = rank_for_density(m, n, own, recipe.rank_multiple, recipe.form)
    return wanted or rank_for_density(m, n, own, 1, recipe.form)


def pivoted(fitted: Truncatable, r: int, dtype: torch.dtype, recipe: Recipe, gram: Tensor | None = None) -> Factorized:
    """Factors of rank r in ``dtype`` as the recipe asks for them; where they would be too inexact, a pair that keeps
    no more numbers.

    gram  second moments of the inputs (n x n) by which coefficients are fitted to the rounded pivot rows
    """
    low_rank = fitted.truncate(r)
    group = _group(recipe, low_rank.shape[0], low_rank.rank)
    made = factorize(
        low_rank,
        dtype,
        pivoting=recipe.pivoting,
        group=group,
        form=recipe.form,
        coefficients=recipe.coefficients,
        gram=gram,
    )
    _torch.counters()["factored"] += 1
    return made if made.factors.form == recipe.form else _smaller_pair(fitted, dtype, recipe, made)


def _smaller_pair(fitted: Truncatable, dtype: torch.dtype, recipe: Recipe, made: Factorized) -> Factorized:
    """The pair that was made in place of pivoted factors, cut to a rank that keeps no more numbers than those would."""
    (m, n), r = made.factors.shape, made.factors.rank
    limit = numbers(recipe.form, m, n, r)
    smaller = rank_for_numbers(m, n, limit, recipe.rank_multiple, "pair") or rank_for_numbers(m, n, limit, 1, "pair")
    cut = factorize(fitted.truncate(smaller), dtype, form="pair")
    return replace(cut, reason=f"{made.reason}; of rank {smaller} instead of {r}, to keep no more numbers")


def _group(recipe: Recipe, m: int, r: int) -> int:
    """Aligned groups where the shape has them; a layer that has not keeps free pivots."""
    group = recipe.pivot_group
    return group if m % group == 0 and r % group == 0 else 1


def factored_record(unit: Unit, made: Factorized, digest: str, **facts: Any) -> LayerRecord:
    """The record of layers whose factors are in the store under ``digest``."""
    factors = made.factors
    dtype = _torch.dtype_name(unit.first.weight.parameter.dtype)
    details = made.details() | {"dtype": dtype} | facts.pop("details", {})
    sizes = {"form": factors.form, "rank": factors.rank, "numbers": factors.numbers, "bytes": factors.nbytes}
    return unit.record(object=digest, error=made.error, reason=made.reason, details=details, **sizes, **facts)


#: The reason for a layer to stay dense that the allocation gave no rank.
ALLOCATED = "left dense by the allocation: the other layers lose less by being smaller"


def too_small(unit: Unit, recipe: Recipe) -> str:
    """The reason for layers to stay dense that no rank fits."""
    m, n = unit.shape
    density = unit.first.override.get("density", recipe.density)
    return f"no rank of a {m} x {n} weight keeps {density:g} of its numbers or fewer"


class Finished:
    """What a walk has finished, in earlier attempts too: written to the run, shown, and found again by layer.

    done  records, by what a layer and its record share
    """

    def __init__(self, writer: RunWriter, bar: tqdm[Any]) -> None:
        self._writer, self._bar = writer, bar
        self.done = layers_done(writer.done.values())

    def add(self, record: LayerRecord) -> None:
        """Remember the layers of a record, unless one of them is there already."""
        if not layers_done([record]).keys() & self.done.keys():
            made = replace(record, name=unused_name(record.name, self._writer.done))
            self._writer.add(made)
            self.done |= layers_done([made])
            show(self._bar, made)


# --- progress --------------------------------------------------------------------------------------------------------


def progress_bar(count: int, title: str, progress: bool) -> tqdm[Any]:
    """A bar over ``count`` layers on standard error."""
    return tqdm(total=count, desc=title, unit="layer", disable=not progress, dynamic_ncols=True)


def show(bar: tqdm[Any], record: LayerRecord) -> None:
    """Move the bar on by the layers of a record."""
    error = "dense" if record.truncation is None else f"error {record.truncation:.3f}"
    bar.set_postfix_str(f"{record.name} {error} {_peak_memory()}", refresh=False)
    bar.update(len(record.layers))


def _peak_memory() -> str:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB peak"
