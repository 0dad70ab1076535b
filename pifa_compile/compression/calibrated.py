"""The walk of methods that know what layers read: block by block, group by group, in the order in which they run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.allocation import allocate_choices, rank_options, tail_losses
from pifa_compile.compression.blocks import Group, find_stacks, runs_in_order, without_cache
from pifa_compile.compression.calibration import Calibration, gradient_moments
from pifa_compile.compression.flows import Captured, Plan, TwoFlows, capture, find_plan, input_width, watch_block
from pifa_compile.compression.joint import alternatives, first_way, joint_sets
from pifa_compile.compression.layer import (
    Layer,
    Truncatable,
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
from pifa_compile.compression.ranks import plan_uniform
from pifa_compile.compression.whitening import Whitening, whiten
from pifa_compile.errors import RecipeError
from pifa_compile.factors import numbers
from pifa_compile.layers import LinearWeight
from pifa_compile.pivoting import check_weight, numerical_rank
from pifa_compile.recipes import Calibrated, Mpifa
from pifa_compile.store import LayerRecord, Run, RunWriter, Store

#: Full gradient moments are kept up to this size for all layers together; above it, their diagonals.
GRADIENT_BYTES = 4 << 30


def compress_calibrated(
    model: nn.Module,
    weights: Sequence[LinearWeight],
    recipe: Calibrated,
    store: Store,
    calibration: Calibration,
    *,
    label: str,
    revision: str | None = None,
    progress: bool = True,
) -> Run:
    """Compress a model's linear layers by a calibrated recipe into the store, and return the finished run.

    Layers that the store already has from an interrupted walk are not computed again. The model is left as it is.
    Raises WeightError naming the layer if a weight or its inputs are not finite, RecipeError for a budget that no
    choice of ranks fits.
    """
    calibration = calibration.to(next(model.parameters()).device)
    layers = distinct_layers(weights, recipe)
    header = run_header(recipe, layers, label, revision, calibration.identity)
    with store.write_run(header) as writer, progress_bar(len(layers), header.run_id, progress) as bar:
        state = _Walk(model, recipe, store, writer, calibration, layers, bar)
        for layer in layers:
            if layer.reason is not None:
                state.add(layer.record(reason=layer.reason))
        if len(state.done) < len(layers):
            with without_cache(model):
                _run(state)
        return writer.finish()


@dataclass(eq=False)
class _Walk:
    """One walk under way.

    named      layers that may be replaced, by the name of every module that holds their weight
    done       records, by what a layer and its record share
    units      which layers share one factorization, by the key of each layer
    ranks      planned for the units, by the key of their first layer; 0 leaves them dense
    gradients  what a layer's outputs are weighted by: E[g g^T] or its diagonal, by module name
    """

    model: nn.Module
    recipe: Calibrated
    store: Store
    writer: RunWriter
    calibration: Calibration
    layers: Sequence[Layer]
    bar: Any
    named: dict[str, Layer] = field(init=False)
    done: dict[Any, LayerRecord] = field(init=False)
    units: dict[Any, Unit] = field(default_factory=dict)
    ranks: dict[Any, int] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = {name: layer for layer in self.layers if layer.reason is None for name in layer.names}
        self.done = layers_done(self.writer.done.values())
        for record in self.writer.done.values():
            show(self.bar, record)

    @property
    def free(self) -> list[Layer]:
        """The layers that share one density."""
        return [layer for layer in self.layers if layer.free]

    def add(self, record: LayerRecord) -> None:
        """Remember finished layers, unless they are there already."""
        if not layers_done([record]).keys() & self.done.keys():
            made = replace(record, name=unused_name(record.name, self.writer.done))
            self.writer.add(made)
            self.done |= layers_done([made])
            show(self.bar, made)

    def missing(self, group: Group) -> bool:
        """Whether a layer of the group is still to be done."""
        return any(self.named[name].key not in self.done for name in group.names)

    def weight_of(self, name: str) -> Tensor | None:
        """The weight (m x n, float64) that stands for a finished layer, or None if it stays dense."""
        layer = self.named[name]
        record = self.done[layer.key]
        if record.object is None:
            return None
        weight = self.store.factors(record).weight()
        rows = next((rows for digest in layer.digests.values() if (rows := record.rows_of(digest))), None)
        return weight if rows is None else weight[slice(*rows)]


@torch.no_grad()
def _run(state: _Walk) -> None:
    model, calibration = state.model, state.calibration
    first = calibration.batches[0]
    stacks = [stack for stack in find_stacks(model) if runs_in_order(model, stack, first)]
    plan = find_plan(model, stacks, list(state.named), first)
    read = {name for group in plan.groups for name in group.names}
    for layer in dict.fromkeys(state.named.values()):
        if not read.intersection(layer.names):
            state.add(layer.record(reason="it reads nothing when the model runs on the calibration text"))
    recipe = state.recipe
    if isinstance(recipe, Mpifa) and (recipe.weighting != "none" or recipe.allocation == "loss"):
        state.gradients = _gradients(state, sorted(read))
    outside, outside_held = _no_moments(model, plan.outside), _no_moments(model, plan.outside)
    rows = capture(model, plan, calibration.batches, outside)
    held = capture(model, plan, calibration.held_out, outside_held)
    _plan_ranks(state, plan, rows, outside)
    for group in plan.outside:
        name = group.names[0]
        _compress_group(state, group, outside[name], outside_held[name])
    for stack, captured, captured_held, blocks in zip(plan.stacks, rows, held, plan.inside, strict=True):
        _walk_stack(state, stack.prefixes, stack.blocks, blocks, captured, captured_held)


def _no_moments(model: nn.Module, groups: Sequence[Group]) -> dict[str, SecondMoments]:
    """Empty moments for each group, by the name of its first layer."""
    return {group.names[0]: _empty(model, group.names[0]) for group in groups}


def _empty(model: nn.Module, name: str) -> SecondMoments:
    module = model.get_submodule(name)
    return SecondMoments.zeros(input_width(module), device=next(module.parameters()).device)


def _gradients(state: _Walk, names: Sequence[str]) -> dict[str, Tensor]:
    wanted = state.recipe.weighting if isinstance(state.recipe, Mpifa) else "none"
    shapes = [state.named[name].weight.shape for name in names]
    form = "diagonal" if wanted == "diagonal" or sum(8 * m * m for m, _ in shapes) > GRADIENT_BYTES else "full"
    found = gradient_moments(state.model, names, state.calibration.batches, form, state.recipe.seed)
    means = {name: moments.mean() for name, moments in found.items()}
    return {name: h for name, h in means.items() if 0 < float(h.sum() if h.dim() == 1 else h.trace()) < math.inf}


# --- ranks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Ways:
    """Layers that read the same tensor, and every way to part them into units that share a factorization.

    tails  what every rank of a unit costs, by the names of its layers
    """

    ways: list[list[tuple[str, ...]]]
    tails: dict[tuple[str, ...], list[float]]


def _plan_ranks(
    state: _Walk, plan: Plan, rows: Sequence[Sequence[Captured]], outside: Mapping[str, SecondMoments]
) -> None:
    """Fill ``state.units`` and ``state.ranks``: of layers with an override by it, else by the recipe's allocation."""
    recipe = state.recipe
    for name, layer in state.named.items():
        if layer.override:
            _settle(state, (name,), override_rank(layer, recipe))
    if recipe.allocation != "uniform":
        _allocate(state, _price(state, plan, rows, outside))
    others: list[tuple[str, ...]] = []
    for group in plan.groups:
        left = [name for name in group.names if state.named[name].key not in state.units]
        others += first_way(left, _joint_sets(state, left))
    others = list({_unit(state, names).first.key: names for names in reversed(others)}.values())[::-1]
    shapes = [_unit(state, names).shape for names in others]
    ranks = plan_uniform(shapes, recipe.density, recipe.rank_multiple, recipe.form)
    for names, r in zip(others, ranks, strict=True):
        _settle(state, names, r)


def _unit(state: _Walk, names: Sequence[str]) -> Unit:
    return Unit(tuple(state.named[name] for name in names))


def _settle(state: _Walk, names: Sequence[str], r: int) -> None:
    unit = _unit(state, names)
    state.units |= {layer.key: unit for layer in unit.layers}
    state.ranks[unit.first.key] = r


def _joint_sets(state: _Walk, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The sets of layers that the recipe joins, among names that read the same tensor."""
    sets = joint_sets(names, state.recipe.joint)
    return [members for members in sets if can_join(_unit(state, members).layers)]


def _price(
    state: _Walk, plan: Plan, rows: Sequence[Sequence[Captured]], outside: Mapping[str, SecondMoments]
) -> list[_Ways]:
    """Price every layer, from one run of the dense model block by block.

    Layers that the loss does not depend on, as far as the gradients tell, get no price but the common density.
    """
    found: list[_Ways] = []
    for group in plan.outside:
        _price_group(state, group, outside[group.names[0]], found)
    for stack, captured, blocks in zip(plan.stacks, rows, plan.inside, strict=True):
        hidden = [row.hidden for row in captured]
        for index, (prefix, block, groups) in enumerate(zip(stack.prefixes, stack.blocks, blocks, strict=True)):
            moments = {group.names[0]: _empty(state.model, group.names[0]) for group in groups}
            hidden = watch_block(block, index, captured, hidden, _seen(moments, prefix))
            for group in groups:
                _price_group(state, group, moments[group.names[0]], found)
    return found


def _price_group(state: _Walk, group: Group, moments: SecondMoments, found: list[_Ways]) -> None:
    """Add what every rank of the group's layers costs, apart and joined, unless they have a price already."""
    moments.check(group.names[0])
    priced = {state.named[name].key for ways in found for names in ways.ways[0] for name in names}
    outputs: dict[str, Tensor] = {}
    whitening = whiten(moments.gram, moments.count)
    for name in group.names:
        layer = state.named[name]
        has_price = state.recipe.allocation != "loss" or name in state.gradients
        if layer.free and layer.key not in priced and has_price:
            outputs[name] = _priced_outputs(state, name, whitening)
            priced.add(layer.key)
    ways = alternatives(list(outputs), _joint_sets(state, list(outputs)))
    tails: dict[tuple[str, ...], list[float]] = {}
    for names in dict.fromkeys(names for way in ways for names in way):
        stacked = torch.cat([outputs[name] for name in names])
        values = torch.linalg.svdvals(stacked)
        tails[names] = tail_losses(values, numerical_rank(values, *stacked.shape))
    if outputs:
        found.append(_Ways(ways, tails))


def _priced_outputs(state: _Walk, name: str, whitening: Whitening) -> Tensor:
    """A layer's outputs on the calibration text (m x n), in units of the loss or relative to their norm.

    Squared singular values of them, or of the outputs of several layers stacked, are what components cost.
    """
    layer = state.named[name]
    if bool(layer.matrix.any()):
        check_weight(layer.matrix, layer.name)
    outputs = whitening.apply(layer.matrix.double())
    if state.recipe.allocation == "loss":
        return output_weighting(state.gradients.get(name)).apply(outputs)
    total = float(outputs.norm())
    return outputs / total if total else outputs


def _allocate(state: _Walk, priced: Sequence[_Ways]) -> None:
    """Settle the units and ranks of all priced layers; in steps of one where no choice of multiples is small enough."""
    recipe = state.recipe
    layers = [state.named[name] for ways in priced for names in ways.ways[0] for name in names]
    budget = recipe.density * sum(layer.weight.shape[0] * layer.weight.shape[1] for layer in layers)
    for multiple in (recipe.rank_multiple, 1):
        choices = [
            [
                [rank_options(*_unit(state, names).shape, ways.tails[names], multiple, recipe.form) for names in way]
                for way in ways.ways
            ]
            for ways in priced
        ]
        chosen = allocate_choices(choices, budget)
        if chosen is not None:
            for ways, (taken, options) in zip(priced, chosen, strict=True):
                for names, option in zip(ways.ways[taken], options, strict=True):
                    _settle(state, names, option.rank)
            return
    raise RecipeError(f"no choice of ranks keeps {recipe.density:g} of the numbers of these layers; raise the density")


# --- factors ---------------------------------------------------------------------------------------------------------


def _walk_stack(
    state: _Walk,
    prefixes: Sequence[str],
    blocks: Sequence[nn.Module],
    groups_of: Sequence[Sequence[Group]],
    rows: Sequence[Captured],
    held_rows: Sequence[Captured],
) -> None:
    dense, held = [row.hidden for row in rows], [row.hidden for row in held_rows]
    changed = dense
    two_flows = isinstance(state.recipe, Mpifa)
    for index, (prefix, block, groups) in enumerate(zip(prefixes, blocks, groups_of, strict=True)):
        firsts = [group.names[0] for group in groups if state.missing(group)]
        held_moments = {name: _empty(state.model, name) for name in firsts}
        held = watch_block(block, index, held_rows, held, _seen(held_moments, prefix))
        if not two_flows:
            moments = {name: _empty(state.model, name) for name in firsts}
            dense = watch_block(block, index, rows, dense, _seen(moments, prefix))
            for group in groups:
                if group.names[0] in moments:
                    _compress_group(state, group, moments.pop(group.names[0]), held_moments.pop(group.names[0]))
            continue
        flows = TwoFlows(block, index, rows, dense, changed, [name.removeprefix(prefix) for name in firsts])
        for group in groups:
            if group.names[0] in held_moments:
                found = flows.moments(group.names[0].removeprefix(prefix))
                _compress_group(state, group, found, held_moments.pop(group.names[0]))
            for name in group.names:
                weight = state.weight_of(name)
                if weight is not None:
                    flows.replace(name.removeprefix(prefix), weight)
        if index + 1 < len(blocks):
            dense, changed = flows.outputs()


def _seen(moments: Mapping[str, SecondMoments], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): found.add for name, found in moments.items()}


def _compress_group(state: _Walk, group: Group, moments: SecondMoments, held: SecondMoments) -> None:
    """Factor the layers of a group that are not done yet, and store them."""
    if not state.missing(group):
        return
    moments.check(group.names[0])
    started = time.perf_counter()
    whitening = whiten(moments.gram, moments.count)
    drift = moments.drift(state.recipe.mixing) if isinstance(state.recipe, Mpifa) else None
    measure = _Measure(held if held.count else moments)
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
    state: _Walk, unit: Unit, whitening: Whitening, drift: Tensor | None, measure: _Measure
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
    matrix = unit.matrix
    target = whitened_target(matrix, whitening, drift)
    weighting = _weighting(state, unit)
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
    facts = {"truncation": achieved, "least_error": least, "details": {"objective": loss}}
    return [factored_record(unit, made, digest, **facts)]


def _weighting(state: _Walk, unit: Unit) -> Weighting:
    """What the unit's outputs are weighted by, if its recipe asks for it."""
    if not isinstance(state.recipe, Mpifa) or state.recipe.weighting == "none":
        return OutputWeighting()
    parts = [
        output_weighting(next((state.gradients[name] for name in layer.names if name in state.gradients), None))
        for layer in unit.layers
    ]
    return parts[0] if len(parts) == 1 else StackedWeighting(parts, unit.sizes)


def _fit(recipe: Calibrated, matrix: Tensor, target: Tensor, whitening: Whitening, weighting: Weighting) -> Truncatable:
    if isinstance(recipe, Mpifa) and recipe.solver == "alternating":
        return alternating(matrix, target, whitening)
    return closed_form(target, whitening, weighting)


def _why_dense(recipe: Calibrated, unit: Unit) -> str:
    if unit.first.free and recipe.allocation != "uniform":
        return "left dense by the allocation: the other layers lose less by being smaller"
    return too_small(unit, recipe)


class _Measure:
    """Relative errors of a layer's outputs on given moments: that of a weight, and the least at its rank."""

    def __init__(self, moments: SecondMoments) -> None:
        values, vectors = torch.linalg.eigh(moments.gram)
        self._root = vectors * values.clamp_min(0).sqrt()

    def __call__(self, matrix: Tensor, made: Tensor, r: int) -> tuple[float, float]:
        """||(made - W) X|| / ||W X||, and the least that any weight of rank r reaches (Eckart and Young 1936)."""
        outputs = matrix.double() @ self._root
        total = float(outputs.norm())
        if total == 0:
            return 0.0, 0.0
        achieved = float((made.to(outputs) @ self._root - outputs).norm())
        return achieved / total, float(torch.linalg.svdvals(outputs)[r:].norm()) / total
