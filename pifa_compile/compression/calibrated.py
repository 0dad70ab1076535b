"""The walk of methods that know what layers read: block by block, group by group, in the order in which they run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.allocation import allocate_choices, rank_options, tail_losses
from pifa_compile.compression.blocks import Group, find_stacks, runs_in_order, watching, without_cache
from pifa_compile.compression.calibration import Calibration, SelfText
from pifa_compile.compression.devices import on_device
from pifa_compile.compression.flows import (
    Captured,
    Plan,
    TwoFlows,
    capture,
    find_plan,
    input_width,
    inputs_of,
    watch_block,
)
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
from pifa_compile.compression.measure import Measure
from pifa_compile.compression.memory import BUDGET, bound, choose_form, walk_size
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
from pifa_compile.compression.output_moments import OutputMoments, blockwise
from pifa_compile.compression.ranks import plan_uniform
from pifa_compile.compression.whitening import Whitening, whiten
from pifa_compile.errors import RecipeError
from pifa_compile.factors import numbers
from pifa_compile.layers import LinearWeight
from pifa_compile.pivoting import check_weight, numerical_rank
from pifa_compile.recipes import Calibrated, Mpifa
from pifa_compile.store import LayerRecord, Run, RunWriter, Store
from pifa_compile.store.scratch import Scratch

_log = logging.getLogger(__name__)


def compress_calibrated(
    model: nn.Module,
    weights: Sequence[LinearWeight],
    recipe: Calibrated,
    store: Store,
    calibration: Calibration | SelfText,
    *,
    label: str,
    revision: str | None = None,
    progress: bool = True,
    device: torch.device | None = None,
) -> Run:
    """Compress a model's linear layers by a calibrated recipe into the store, and return the finished run.

    device  where blocks compute, one at a time; everything outside of them must be there. Default: where the model is

    Layers that the store already has from an interrupted walk are not computed again. The model is left as it is.
    Raises WeightError naming the layer if a weight or its inputs are not finite, RecipeError for a budget that no
    choice of ranks fits.
    """
    layers = distinct_layers(weights, recipe)
    header = run_header(recipe, layers, label, revision, calibration.identity)
    with store.write_run(header) as writer, progress_bar(len(layers), header.run_id, progress) as bar:
        state = _Walk(model, recipe, store, writer, layers, bar, device or next(model.parameters()).device)
        for layer in layers:
            if layer.reason is not None:
                state.add(layer.record(reason=layer.reason))
        if len(state.done) < len(layers):
            with without_cache(model):
                _run(state, calibration.to(state.device))
        run = writer.finish()
        state.scratch.clear()
        return run


@dataclass(eq=False)
class _Walk:
    """One walk under way.

    named      layers that may be replaced, by the name of every module that holds their weight
    done       records, by what a layer and its record share
    units      which layers share one factorization, by the key of each layer
    ranks      planned for the units, by the key of their first layer; 0 leaves them dense
    gradients  what outputs are weighted by: E[g g^T] or its diagonal, by module name; of the block under way, and of
               layers outside of blocks
    device     where moments are and layers are solved
    """

    model: nn.Module
    recipe: Calibrated
    store: Store
    writer: RunWriter
    layers: Sequence[Layer]
    bar: Any
    device: torch.device
    named: dict[str, Layer] = field(init=False)
    done: dict[Any, LayerRecord] = field(init=False)
    units: dict[Any, Unit] = field(default_factory=dict)
    ranks: dict[Any, int] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    outputs: OutputMoments | None = None
    scratch: Scratch = field(init=False)

    def __post_init__(self) -> None:
        self.scratch = Scratch(self.store.root, self.writer.header.run_id)
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
def _run(state: _Walk, calibration: Calibration) -> None:
    model, first = state.model, calibration.batches[0]
    stacks = [stack for stack in find_stacks(model) if runs_in_order(model, stack, first)]
    rows_read: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        rows_read[name] = x.numel() // input_width(model.get_submodule(name))

    with watching(model, list(state.named), note):
        plan = find_plan(model, stacks, list(state.named), first)
    read = {name for group in plan.groups for name in group.names}
    for layer in dict.fromkeys(state.named.values()):
        if not read.intersection(layer.names):
            state.add(layer.record(reason="it reads nothing when the model runs on the calibration text"))
    state.outputs = _output_moments(state, plan, rows_read, calibration)
    outside, outside_held = _no_moments(state, plan.outside), _no_moments(state, plan.outside)
    rows = capture(model, plan, calibration.batches, outside, state.outputs.forward if state.outputs else None)
    held = capture(model, plan, calibration.held_out, outside_held)
    _plan_ranks(state, plan, rows, outside)
    for group in plan.outside:
        name = group.names[0]
        _compress_group(state, group, outside[name], outside_held[name])
    for stack, captured, captured_held, blocks in zip(plan.stacks, rows, held, plan.inside, strict=True):
        _walk_stack(state, stack.prefixes, stack.blocks, blocks, captured, captured_held)


def _no_moments(state: _Walk, groups: Sequence[Group]) -> dict[str, SecondMoments]:
    """Empty moments for each group, by the name of its first layer."""
    return {group.names[0]: _empty(state, group.names[0]) for group in groups}


def _empty(state: _Walk, name: str) -> SecondMoments:
    return SecondMoments.zeros(input_width(state.model.get_submodule(name)), device=state.device)


def _output_moments(
    state: _Walk, plan: Plan, rows: Mapping[str, int], calibration: Calibration
) -> OutputMoments | None:
    """What the recipe weights outputs or prices ranks by, not yet computed; None if it does neither.

    rows  that each layer reads of the first batch

    Tells how much memory the walk will take.
    """
    recipe, batches, names = state.recipe, calibration.batches, sorted(n for g in plan.groups for n in g.names)
    needed = isinstance(recipe, Mpifa) and (recipe.weighting != "none" or recipe.allocation == "loss")
    walked = needed and blockwise(state.model, plan, names, batches[0])
    wanted = recipe.weighting if isinstance(recipe, Mpifa) and recipe.weighting != "none" else "full"
    size = walk_size(state.model, plan, rows, batches, recipe, blockwise=walked, units=_unit_sizes(state))
    form = choose_form(size, wanted)
    _say(state, str(bound(size, form)))
    if not isinstance(recipe, Mpifa) or not needed:
        return None
    if form != wanted:
        beside = bound(size, wanted).beside / 2**30
        _log.warning(
            "%s: %s gradient moments would take %.1f GiB of memory, above %.0f; the %s ones are used",
            *(state.writer.header.run_id, wanted, beside, BUDGET / 2**30, form),
        )
    again = recipe.weighting != "none"
    facts: dict[str, Any] = {"form": form, "walked": walked, "seed": recipe.seed, "again": again}
    return OutputMoments(state.model, plan, names, batches, scratch=state.scratch, device=state.device, **facts)


def _unit_sizes(state: _Walk) -> Callable[[Sequence[str]], list[int]]:
    """m of the sets of layers that the recipe joins, among names that read the same tensor."""
    return lambda names: [_unit(state, members).shape[0] for members in _joint_sets(state, names)]


def _say(state: _Walk, text: str) -> None:
    _log.info("%s: %s", state.writer.header.run_id, text)
    if not state.bar.disable:
        state.bar.write(text, file=sys.stderr)


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
    recipe, outputs = state.recipe, state.outputs
    if outputs is not None and outputs.plan is not None:
        state.gradients = outputs.kept
        for names, r in outputs.plan:
            _settle(state, names, r)
        return
    for name, layer in state.named.items():
        if layer.override:
            _settle(state, (name,), override_rank(layer, recipe))
    priced = _price(state, plan, rows, outside) if recipe.allocation != "uniform" or outputs is not None else []
    if recipe.allocation != "uniform":
        _allocate(state, priced)
    others: list[tuple[str, ...]] = []
    for group in plan.groups:
        left = [name for name in group.names if state.named[name].key not in state.units]
        others += first_way(left, _joint_sets(state, left))
    others = list({_unit(state, names).first.key: names for names in reversed(others)}.values())[::-1]
    shapes = [_unit(state, names).shape for names in others]
    ranks = plan_uniform(shapes, recipe.density, recipe.rank_multiple, recipe.form)
    for names, r in zip(others, ranks, strict=True):
        _settle(state, names, r)
    if outputs is not None:
        units = dict.fromkeys(state.units.values())
        outputs.finish([[[layer.name for layer in unit.layers], state.ranks[unit.first.key]] for unit in units])


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
    """Price every layer, if the allocation wants prices, from one run of the dense model block by block: forwards, or
    the backward pass where there are gradients to be had.

    Layers that the loss does not depend on, as far as the gradients tell, get no price but the common density.
    """
    found: list[_Ways] = []
    wanted = state.recipe.allocation != "uniform"
    for groups, moments in _dense_blocks(state, plan, rows, wanted):
        for group in groups if wanted else ():
            _price_group(state, group, moments.pop(group.names[0]), found)
    for group in plan.outside if wanted else ():
        kept = outside[group.names[0]]
        _price_group(state, group, SecondMoments(kept.gram.clone(), count=kept.count), found)
    return found


def _dense_blocks(
    state: _Walk, plan: Plan, rows: Sequence[Sequence[Captured]], wanted: bool
) -> Iterator[tuple[Sequence[Group], dict[str, SecondMoments]]]:
    """The groups of every block and, if ``wanted``, what they read in the dense model, by the name of the first layer.

    Meanwhile the gradient moments of the block are in ``state.gradients``, in the end those that are kept in memory.
    """
    outputs = state.outputs
    if outputs is not None:
        readers = [[g.names[0] for g in groups] if wanted else [] for blocks in plan.inside for groups in blocks]
        for index, state.gradients, moments in outputs.blocks(rows[0] if rows else [], readers):
            yield plan.inside[0][index], moments
        state.gradients = outputs.kept
        if outputs.walked:
            return
    for stack, captured, blocks in zip(plan.stacks, rows, plan.inside, strict=True):
        hidden = [row.hidden for row in captured]
        for index, (prefix, block, groups) in enumerate(zip(stack.prefixes, stack.blocks, blocks, strict=True)):
            moments = _no_moments(state, groups)
            with on_device(block, state.device):
                hidden = watch_block(block, index, captured, hidden, _seen(moments, prefix))
            yield groups, moments


def _price_group(state: _Walk, group: Group, moments: SecondMoments, found: list[_Ways]) -> None:
    """Add what every rank of the group's layers costs, apart and joined, unless they have a price already.

    The moments are gone afterwards.
    """
    moments.check(group.names[0])
    priced = {state.named[name].key for ways in found for names in ways.ways[0] for name in names}
    outputs: dict[str, Tensor] = {}
    whitening = whiten(moments.take_gram(), moments.count, overwrite=True)
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
    matrix = layer.matrix.to(state.device)
    if bool(matrix.any()):
        check_weight(matrix, layer.name)
    outputs = whitening.apply(matrix)
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
    dense, held = [row.take() for row in rows], [row.take() for row in held_rows]
    changed = list(dense)
    for index, (prefix, block, groups) in enumerate(zip(prefixes, blocks, groups_of, strict=True)):
        with on_device(block, state.device):
            visit = _Visit(block, prefix, index, groups, held_rows, held)
            if isinstance(state.recipe, Mpifa):
                dense, changed = _walk_two_flows(state, visit, rows, dense, changed)
            else:
                moments = _no_moments(state, [group for group in groups if state.missing(group)])
                dense = watch_block(block, index, rows, dense, _seen(moments, prefix))
                for group in groups:
                    if group.names[0] in moments:
                        _compress_group(state, group, moments.pop(group.names[0]), visit.held_moments(state, group))
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

    def held_moments(self, state: _Walk, group: Group) -> SecondMoments:
        """Moments of what a group reads of it. Of one group only: those of all would be as large as the solver."""
        found = _empty(state, group.names[0])
        for row, states in zip(self.held_rows, self.held, strict=True):
            name = group.names[0].removeprefix(self.prefix)
            found.add(inputs_of(self.block, name, row.calls[self.index], states, row.mask))
        return found


def _walk_two_flows(
    state: _Walk, visit: _Visit, rows: Sequence[Captured], dense: list[Tensor], changed: list[Tensor]
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
            _compress_group(state, group, found, visit.held_moments(state, group))
        for name in group.names:
            state.gradients.pop(name, None)
            weight = state.weight_of(name)
            if weight is not None:
                flows.replace(name.removeprefix(visit.prefix), weight)
    return flows.outputs() if index + 1 < len(rows[0].calls) else ([], [])


def _seen(moments: Mapping[str, SecondMoments], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): found.add for name, found in moments.items()}


def _compress_group(state: _Walk, group: Group, moments: SecondMoments, held: SecondMoments) -> None:
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
    state: _Walk, unit: Unit, whitening: Whitening, drift: Tensor | None, measure: Measure
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


def _weighting(state: _Walk, unit: Unit) -> Weighting:
    """What the unit's outputs are weighted by, if its recipe asks for it. The moments that it is made of are gone."""
    if not isinstance(state.recipe, Mpifa) or state.recipe.weighting == "none":
        return OutputWeighting()
    parts = [
        output_weighting(next((state.gradients.pop(n) for n in layer.names if n in state.gradients), None))
        for layer in unit.layers
    ]
    return parts[0] if len(parts) == 1 else StackedWeighting(parts, unit.sizes)


def _form_of(state: _Walk, unit: Unit) -> str:
    """The form of the gradient moments that the unit's outputs were weighted by."""
    known = all(any(name in state.gradients for name in layer.names) for layer in unit.layers)
    return state.outputs.form if state.outputs is not None and state.outputs.again and known else "none"


def _fit(recipe: Calibrated, matrix: Tensor, target: Tensor, whitening: Whitening, weighting: Weighting) -> Truncatable:
    if isinstance(recipe, Mpifa) and recipe.solver == "alternating":
        return alternating(matrix, target, whitening)
    return closed_form(target, whitening, weighting)


def _why_dense(recipe: Calibrated, unit: Unit) -> str:
    if unit.first.free and recipe.allocation != "uniform":
        return "left dense by the allocation: the other layers lose less by being smaller"
    return too_small(unit, recipe)
