"""The walk over the layers that every method shares: digests, budget, factors, store, progress, resume."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

from pifa_compile import _torch
from pifa_compile.compression.ranks import UniformBudget
from pifa_compile.compression.svd import Spectrum, spectrum
from pifa_compile.digest import cast_digests
from pifa_compile.errors import WeightError
from pifa_compile.factors import numbers, rank_for_density
from pifa_compile.layers import LinearWeight, as_matrix
from pifa_compile.pivoting import factorize
from pifa_compile.recipes import Recipe
from pifa_compile.store import LayerRecord, Run, RunHeader, Store


@dataclass(frozen=True)
class _Layer:
    """One weight to be walked, with its digests and the reason to leave it dense, if any."""

    weight: LinearWeight
    digests: dict[str, str]
    reason: str | None

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def own_digest(self) -> str:
        return self.digests[_torch.dtype_name(self.weight.parameter.dtype)]

    def record(self, **facts: Any) -> LayerRecord:
        """The layer's record: dense unless ``facts`` say otherwise."""
        m, n = self.weight.shape
        known = {"name": self.name, "digests": self.digests, "shape": (m, n), "layout": self.weight.layout}
        dense = {"object": None, "form": "dense", "rank": 0, "numbers": m * n, "bytes": self.weight.parameter.nbytes}
        return LayerRecord(**known | dense | {"seconds": 0.0} | facts)


def compress_weights(
    weights: Sequence[LinearWeight],
    recipe: Recipe,
    store: Store,
    *,
    model: str,
    revision: str | None = None,
    progress: bool = True,
) -> Run:
    """Compress weights by a data-free recipe, layer by layer into the store, and return the finished run.

    Layers that the store already has from an interrupted walk are not computed again. Raises WeightError naming the
    layer if a weight is not finite; what was finished before stays in the store.
    """
    layers = _distinct(weights, recipe)
    header = RunHeader(
        run_id=run_id(recipe, [layer.own_digest for layer in layers]),
        model=model,
        revision=revision,
        recipe=recipe.to_json(),
        calibration=None,
        seed=recipe.seed,
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        layers_planned=len(layers),
    )
    free = [layer for layer in layers if layer.reason is None and not recipe.override_for(layer.name)]
    budget = UniformBudget.over([x.weight.shape for x in free], recipe.density, recipe.rank_multiple, recipe.form)
    with store.write_run(header) as writer, _bar(layers, header.run_id, progress) as bar:
        done = {digest: record for record in writer.done.values() for digest in record.digests.values()}
        for layer in layers:
            record = done.get(layer.own_digest)
            if record is None:
                record = _compress_layer(layer, recipe, budget, store)
                writer.add(record)
            if layer.reason is None and not recipe.override_for(layer.name):
                _book(budget, layer, record)
            _show(bar, layer, record)
        return writer.finish()


def _distinct(weights: Sequence[LinearWeight], recipe: Recipe) -> list[_Layer]:
    """Layers in order, those with the same content once."""
    found: dict[str, _Layer] = {}
    for weight in weights:
        reason = weight.reason or recipe.reason_to_skip(weight.name)
        layer = _Layer(weight, cast_digests(weight.parameter.detach()), reason)
        found.setdefault(layer.own_digest, layer)
    return list(found.values())


def run_id(recipe: Recipe, digests: Sequence[str], calibration: dict[str, Any] | None = None) -> str:
    """The id that this recipe on these weights always gets, so that a repeated or interrupted run is found again."""
    identity = {"recipe": recipe.to_json(), "weights": list(digests), "calibration": calibration}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"{recipe.method}-{recipe.density:g}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def versions() -> dict[str, str]:
    """The versions of what the numbers depend on."""
    names = ("pifa-compile", "torch", "scipy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _compress_layer(layer: _Layer, recipe: Recipe, budget: UniformBudget, store: Store) -> LayerRecord:
    if layer.reason is not None:
        return layer.record(reason=layer.reason)
    started = time.perf_counter()
    matrix = as_matrix(layer.weight.parameter, layer.weight.layout)
    try:
        spectral = spectrum(matrix, layer.name)
    except WeightError:
        if bool(matrix.any()):
            raise
        return layer.record(reason="the weight is all zeros")
    r = _rank(layer, recipe, budget, spectral)
    m, n = layer.weight.shape
    if r == 0:
        return layer.record(reason=f"no rank of a {m} x {n} weight keeps {recipe.density:g} of its numbers or fewer")
    if numbers(recipe.form, m, n, r) >= m * n:
        return layer.record(reason=f"rank {r} would save nothing")
    made = factorize(
        spectral.truncate(r), matrix.dtype, pivoting=recipe.pivoting, group=_group(recipe, m, r), form=recipe.form
    )
    _torch.counters()["factored"] += 1
    least = spectral.truncation_error(r)
    return layer.record(
        object=store.put_factors(made.factors),
        form=made.factors.form,
        rank=r,
        numbers=made.factors.numbers,
        bytes=made.factors.nbytes,
        seconds=time.perf_counter() - started,
        error=made.error,
        truncation=least,
        least_error=least,
        reason=made.reason,
        details=made.details() | {"dtype": _torch.dtype_name(matrix.dtype)},
    )


def _group(recipe: Recipe, m: int, r: int) -> int:
    """Aligned groups where the shape has them; a layer that has not keeps free pivots."""
    group = recipe.pivot_group
    return group if m % group == 0 and r % group == 0 else 1


def _rank(layer: _Layer, recipe: Recipe, budget: UniformBudget, spectral: Spectrum) -> int:
    m, n = layer.weight.shape
    override = recipe.override_for(layer.name)
    if "rank" in override:
        wanted = int(override["rank"])
    elif "density" in override:
        wanted = rank_for_density(m, n, override["density"], recipe.rank_multiple, recipe.form)
    else:
        wanted = budget.rank(m, n)
    return min(wanted, spectral.rank)


def _book(budget: UniformBudget, layer: _Layer, record: LayerRecord) -> None:
    m, n = layer.weight.shape
    usable = record.object is not None and record.rank < budget.rank(m, n)
    budget.spend(m, n, record.numbers, exhausted=usable)


def _bar(layers: list[_Layer], title: str, progress: bool) -> tqdm[Any]:
    return tqdm(total=len(layers), desc=title, unit="layer", disable=not progress, dynamic_ncols=True)


def _show(bar: tqdm[Any], layer: _Layer, record: LayerRecord) -> None:
    error = "dense" if record.truncation is None else f"error {record.truncation:.3f}"
    bar.set_postfix_str(f"{layer.name} {error} {_peak_memory()}", refresh=False)
    bar.update()


def _peak_memory() -> str:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB peak"
