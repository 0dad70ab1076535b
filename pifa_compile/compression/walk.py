"""The walk of data-free methods: one layer after the other, under one budget, into the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from pifa_compile.compression.joint import first_way, joint_sets
from pifa_compile.compression.layer import (
    Layer,
    Unit,
    can_join,
    distinct_layers,
    factored_record,
    layers_done,
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
from pifa_compile.errors import RecipeError
from pifa_compile.factors import numbers
from pifa_compile.layers import LinearWeight
from pifa_compile.recipes import Calibrated, FirstCall, Joint, Recipe
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
    if isinstance(recipe, FirstCall):
        cure = "compile with backend='pifa' and options={'density': ..., 'calibrate': 'first-call'}"
        raise RecipeError(f"method {recipe.method!r} needs the call of a compiled model; {cure}")
    layers = distinct_layers(weights, recipe)
    units = _units(layers, recipe)
    header = run_header(recipe, layers, model, revision)
    shapes = [unit.shape for unit in units if unit.first.free]
    budget = UniformBudget.over(shapes, recipe.density, recipe.rank_multiple, recipe.form)
    with store.write_run(header) as writer, progress_bar(len(layers), header.run_id, progress) as bar:
        done = layers_done(writer.done.values())
        for unit in units:
            if any(layer.key not in done for layer in unit.layers):
                for made in _compress_unit(unit, recipe, budget, store):
                    if not layers_done([made]).keys() & done.keys():
                        record = replace(made, name=unused_name(made.name, writer.done))
                        writer.add(record)
                        done |= layers_done([record])
            for record in {id(r): r for layer in unit.layers for r in [done[layer.key]]}.values():
                if unit.first.free:
                    _book(budget, recipe, record)
                show(bar, record)
        return writer.finish()


def _units(layers: Sequence[Layer], recipe: Recipe) -> list[Unit]:
    """The layers in order, those that the recipe joins as one, at the place of the first of them."""
    if not isinstance(recipe, Joint):
        return [Unit((layer,)) for layer in layers]
    named = {unused_name(layer.name, [other.name for other in layers[:i]]): layer for i, layer in enumerate(layers)}
    sets = joint_sets(list(named), recipe.joint)
    fitting = [members for members in sets if can_join([named[name] for name in members])]
    return [Unit(tuple(named[name] for name in members)) for members in first_way(list(named), fitting)]


def _compress_unit(unit: Unit, recipe: Recipe, budget: UniformBudget, store: Store) -> list[LayerRecord]:
    """The record of the unit's factors, or one for each of its layers where they stay dense."""
    if unit.first.reason is not None:
        return unit.dense(unit.first.reason)
    started = time.perf_counter()
    for layer in unit.layers:
        if not bool(layer.matrix.any()):
            return unit.dense("the weight is all zeros" if len(unit.layers) == 1 else f"{layer.name} is all zeros")
    matrix = unit.matrix
    spectral = spectrum(matrix, unit.name)
    r = _rank(unit, recipe, budget, spectral)
    m, n = unit.shape
    if r == 0:
        return unit.dense(too_small(unit, recipe))
    if numbers(recipe.form, m, n, r) >= m * n:
        return unit.dense(f"rank {r} would save nothing")
    made = pivoted(spectral, r, matrix.dtype, recipe)
    least = spectral.truncation_error(made.factors.rank)
    digest = store.put_factors(made.factors)
    seconds = time.perf_counter() - started
    return [factored_record(unit, made, digest, seconds=seconds, truncation=least, least_error=least)]


def _rank(unit: Unit, recipe: Recipe, budget: UniformBudget, spectral: Spectrum) -> int:
    wanted = override_rank(unit.first, recipe) if unit.first.override else budget.rank(*unit.shape)
    return min(wanted, spectral.rank)


def _book(budget: UniformBudget, recipe: Recipe, record: LayerRecord) -> None:
    m, n = record.shape
    if record.object is None:
        budget.leave_dense(m, n)
    else:
        exhausted = record.form == recipe.form and record.rank < budget.rank(m, n)
        budget.spend(m, n, record.numbers, exhausted)
