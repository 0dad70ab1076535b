"""The walk of data-free methods: one layer after the other, under one budget, into the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from pifa_compile.compression.layer import (
    Layer,
    content,
    distinct_layers,
    factored_record,
    override_rank,
    pivoted,
    progress_bar,
    run_header,
    show,
    too_small,
    unused_name,
)
from pifa_compile.compression.ranks import UniformBudget
from pifa_compile.compression.svd import Spectrum, spectrum
from pifa_compile.errors import RecipeError, WeightError
from pifa_compile.factors import numbers
from pifa_compile.layers import LinearWeight
from pifa_compile.recipes import Calibrated, Recipe
from pifa_compile.store import LayerRecord, Run, Store


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
    layer if a weight is not finite; what was finished before stays in the store. Raises RecipeError for a method that
    needs more than weights.
    """
    if isinstance(recipe, Calibrated):
        cure = "compress the model first, with pifa_compile.compress or `pifa compress`"
        raise RecipeError(f"method {recipe.method!r} needs the model and a text; {cure}")
    layers = distinct_layers(weights, recipe)
    header = run_header(recipe, layers, model, revision)
    shapes = [layer.weight.shape for layer in layers if layer.free]
    budget = UniformBudget.over(shapes, recipe.density, recipe.rank_multiple, recipe.form)
    with store.write_run(header) as writer, progress_bar(len(layers), header.run_id, progress) as bar:
        done = {content(record.digests) or record.name: record for record in writer.done.values()}
        for layer in layers:
            record = done.get(layer.key)
            if record is None:
                made = _compress_layer(layer, recipe, budget, store)
                record = replace(made, name=unused_name(made.name, writer.done))
                writer.add(record)
            if layer.free:
                _book(budget, recipe, record)
            show(bar, layer, record)
        return writer.finish()


def _compress_layer(layer: Layer, recipe: Recipe, budget: UniformBudget, store: Store) -> LayerRecord:
    if layer.reason is not None:
        return layer.record(reason=layer.reason)
    started = time.perf_counter()
    try:
        spectral = spectrum(layer.matrix, layer.name)
    except WeightError:
        if bool(layer.matrix.any()):
            raise
        return layer.record(reason="the weight is all zeros")
    r = _rank(layer, recipe, budget, spectral)
    m, n = layer.weight.shape
    if r == 0:
        return layer.record(reason=too_small(layer, recipe))
    if numbers(recipe.form, m, n, r) >= m * n:
        return layer.record(reason=f"rank {r} would save nothing")
    made = pivoted(spectral, r, layer.matrix.dtype, recipe)
    least = spectral.truncation_error(made.factors.rank)
    digest = store.put_factors(made.factors)
    seconds = time.perf_counter() - started
    return factored_record(layer, made, digest, seconds=seconds, truncation=least, least_error=least)


def _rank(layer: Layer, recipe: Recipe, budget: UniformBudget, spectral: Spectrum) -> int:
    wanted = override_rank(layer, recipe) if layer.override else budget.rank(*layer.weight.shape)
    return min(wanted, spectral.rank)


def _book(budget: UniformBudget, recipe: Recipe, record: LayerRecord) -> None:
    m, n = record.shape
    if record.object is None:
        budget.leave_dense(m, n)
    else:
        exhausted = record.form == recipe.form and record.rank < budget.rank(m, n)
        budget.spend(m, n, record.numbers, exhausted)
