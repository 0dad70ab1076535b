"""Factors for the layers of a model, group by group in the order in which they run, each fitted to what it reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pifa_compile.compression.blocks import Group
from pifa_compile.compression.devices import on_device
from pifa_compile.compression.flows import Captured, TwoFlows, inputs_of, watch_block
from pifa_compile.compression.layer import ALLOCATED, Truncatable, Unit, factored_record, pivoted, too_small
from pifa_compile.compression.measure import Measure
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.compression.mpifa import (
    OutputWeighting,
    StackedWeighting,
    Weighting,
    alternating,
    closed_form,
    objective,
    output_weighting,
    whitened_target,
)
from pifa_compile.compression.state import Walk, collectors, empty_moments, no_moments
from pifa_compile.compression.whitening import Whitening, whiten
from pifa_compile.factors import numbers
from pifa_compile.pivoting import check_weight
from pifa_compile.recipes import Calibrated, Mpifa
from pifa_compile.store import LayerRecord


def walk_stack(
    state: Walk,
    prefixes: Sequence[str],
    blocks: Sequence[nn.Module],
    groups_of: Sequence[Sequence[Group]],
    rows: Sequence[Captured],
    held_rows: Sequence[Captured],
) -> None:
    dense, held = [row.take() for row in rows], [row.take() for row in held_rows]
    changed = list(dense)
    for index, (prefix, block, groups) in enumerate(zip(prefixes, blocks, groups_of, strict=True)):
        with on_device(block, state.device):
            visit = _Visit(block, prefix, index, groups, held_rows, held)
            if isinstance(state.recipe, Mpifa):
                dense, changed = _walk_two_flows(state, visit, rows, dense, changed)
            else:
                moments = no_moments(state, [group for group in groups if state.missing(group)])
                dense = watch_block(block, index, rows, dense, collectors(moments, prefix))
                for group in groups:
                    if group.names[0] in moments:
                        compress_group(state, group, moments.pop(group.names[0]), visit.held_moments(state, group))
            held = watch_block(block, index, held_rows, held, {})


@dataclass(eq=False)
class _Visit:
    """One block of the walk, and what enters it of the text that is held out to measure errors on."""

    block: nn.Module
    prefix: str
    index: int
    groups: Sequence[Group]
    held_rows: Sequence[Captured]
    held: Sequence[Tensor]

    def held_moments(self, state: Walk, group: Group) -> SecondMoments:
        """Moments of what a group reads of it. Of one group only: those of all would be as large as the solver."""
        found = empty_moments(state, group.names[0])
        for row, states in zip(self.held_rows, self.held, strict=True):
            name = group.names[0].removeprefix(self.prefix)
            found.add(inputs_of(self.block, name, row.calls[self.index], states, row.mask))
        return found


def _walk_two_flows(
    state: Walk, visit: _Visit, rows: Sequence[Captured], dense: list[Tensor], changed: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Factor the layers of one block; returns the hidden states that leave it in both flows."""
    block, index = visit.block, visit.index
    firsts = [group.names[0] for group in visit.groups if state.missing(group)]
    if state.outputs is not None and state.outputs.again and firsts:
        state.gradients = state.outputs.kept | state.outputs.of_block(index, rows, dense)
    flows = TwoFlows(block, index, rows, dense, changed, [name.removeprefix(visit.prefix) for name in firsts])
    for group in visit.groups:
        if group.names[0] in firsts:
            found = flows.moments(group.names[0].removeprefix(visit.prefix))
            compress_group(state, group, found, visit.held_moments(state, group))
        for name in group.names:
            state.gradients.pop(name, None)
            weight = state.weight_of(name)
            if weight is not None:
                flows.replace(name.removeprefix(visit.prefix), weight)
    return flows.outputs() if index + 1 < len(rows[0].calls) else ([], [])


def compress_group(state: Walk, group: Group, moments: SecondMoments, held: SecondMoments) -> None:
    """Factor the layers of a group that are not done yet, and store them."""
    if not state.missing(group):
        return
    moments.check(group.names[0])
    started = time.perf_counter()
    measure = Measure(held.gram if held.count else moments.gram.clone())
    drift = moments.drift_(state.recipe.mixing) if isinstance(state.recipe, Mpifa) else None
    whitening = whiten(moments.take_gram(), moments.count, overwrite=True)
    units = dict.fromkeys(state.units[state.named[name].key] for name in group.names)
    shared = (time.perf_counter() - started) / len(units)
    for unit in units:
        if any(layer.key not in state.done for layer in unit.layers):
            began = time.perf_counter()
            records = _compress_unit(state, unit, whitening, drift, measure)
            seconds = (time.perf_counter() - began + shared) / len(records)
            for record in records:
                facts = {"input_rank": whitening.rank, "tokens": moments.count} if record.object else {}
                state.add(replace(record, seconds=seconds, details=record.details | facts))


def _compress_unit(
    state: Walk, unit: Unit, whitening: Whitening, drift: Tensor | None, measure: Measure
) -> list[LayerRecord]:
    """The record of the unit's factors, or one for each of its layers where they stay dense."""
    recipe, (m, n) = state.recipe, unit.shape
    for layer in unit.layers:
        if not bool(layer.matrix.any()):
            return unit.dense("the weight is all zeros" if len(unit.layers) == 1 else f"{layer.name} is all zeros")
        check_weight(layer.matrix, layer.name)
    planned = state.ranks[unit.first.key]
    if planned == 0:
        return unit.dense(_why_dense(recipe, unit))
    matrix = unit.matrix.to(state.device)
    target = whitened_target(matrix, whitening, drift)
    form, weighting = _form_of(state, unit), _weighting(state, unit)
    fitted = _fit(recipe, matrix, target, whitening, weighting)
    r = min(planned, fitted.rank)
    if r == 0:
        return unit.dense("its outputs on the calibration text are all zeros")
    if numbers(recipe.form, m, n, r) >= m * n:
        return unit.dense(f"rank {r} would save nothing")
    made = pivoted(fitted, r, matrix.dtype, recipe, whitening.gram if recipe.refit == "inputs" else None)
    r = made.factors.rank
    achieved, least = measure(matrix, made.factors.weight(), r)
    loss = objective(fitted.truncate(r), target, whitening, weighting)
    digest = state.store.put_factors(made.factors)
    facts = {"truncation": achieved, "least_error": least, "details": {"objective": loss, "weighting": form}}
    return [factored_record(unit, made, digest, **facts)]


def _weighting(state: Walk, unit: Unit) -> Weighting:
    """What the unit's outputs are weighted by, if its recipe asks for it. The moments that it is made of are gone."""
    if not isinstance(state.recipe, Mpifa) or state.recipe.weighting == "none":
        return OutputWeighting()
    parts = [
        output_weighting(next((state.gradients.pop(n) for n in layer.names if n in state.gradients), None))
        for layer in unit.layers
    ]
    return parts[0] if len(parts) == 1 else StackedWeighting(parts, unit.sizes)


def _form_of(state: Walk, unit: Unit) -> str:
    """The form of the gradient moments that the unit's outputs were weighted by."""
    known = all(any(name in state.gradients for name in layer.names) for layer in unit.layers)
    return state.outputs.form if state.outputs is not None and state.outputs.again and known else "none"


def _fit(recipe: Calibrated, matrix: Tensor, target: Tensor, whitening: Whitening, weighting: Weighting) -> Truncatable:
    if isinstance(recipe, Mpifa) and recipe.solver == "alternating":
        return alternating(matrix, target, whitening)
    return closed_form(target, whitening, weighting)


def _why_dense(recipe: Calibrated, unit: Unit) -> str:
    if unit.first.free and recipe.allocation != "uniform":
        return ALLOCATED
    return too_small(unit, recipe)
