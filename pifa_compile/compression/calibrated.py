"""The walk of methods that know what layers read: block by block, group by group, in the order in which they run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.allocation import allocate, rank_options, tail_losses
from pifa_compile.compression.blocks import Group, find_stacks, runs_in_order, without_cache
from pifa_compile.compression.calibration import Calibration, gradient_moments
from pifa_compile.compression.flows import Captured, Plan, TwoFlows, capture, find_plan, input_width, watch_block
from pifa_compile.compression.layer import (
    Layer,
    Truncatable,
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
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.compression.mpifa import (
    OutputWeighting,
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
                state.add(layer, layer.record(reason=layer.reason))
        if len(state.done) < len(layers):
            with without_cache(model):
                _run(state)
        return writer.finish()


@dataclass(eq=False)
class _Walk:
    """One walk under way.

    named      layers that may be replaced, by the name of every module that holds their weight
    done       records, by what a layer and its record share
    ranks      planned for the layers of ``named``, by the same key; 0 leaves the layer dense
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
    ranks: dict[Any, int] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = {name: layer for layer in self.layers if layer.reason is None for name in layer.names}
        self.done = {content(r.digests) or r.name: r for r in self.writer.done.values()}
        for layer in self.layers:
            if layer.key in self.done:
                show(self.bar, layer, self.done[layer.key])

    @property
    def free(self) -> list[Layer]:
        """The layers that share one density."""
        return [layer for layer in self.layers if layer.free]

    def add(self, layer: Layer, record: LayerRecord) -> None:
        """Remember a finished layer, unless it is there already."""
        if layer.key not in self.done:
            made = replace(record, name=unused_name(record.name, self.writer.done))
            self.writer.add(made)
            self.done[layer.key] = made
            show(self.bar, layer, made)

    def missing(self, group: Group) -> bool:
        """Whether a layer of the group is still to be done."""
        return any(self.named[name].key not in self.done for name in group.names)

    def weight_of(self, name: str) -> Tensor | None:
        """The weight (m x n, float64) that stands for a finished layer, or None if it stays dense."""
        record = self.done[self.named[name].key]
        return None if record.object is None else self.store.factors(record).weight()


@torch.no_grad()
def _run(state: _Walk) -> None:
    model, calibration = state.model, state.calibration
    first = calibration.batches[0]
    stacks = [stack for stack in find_stacks(model) if runs_in_order(model, stack, first)]
    plan = find_plan(model, stacks, list(state.named), first)
    read = {name for group in plan.groups for name in group.names}
    for layer in dict.fromkeys(state.named.values()):
        if not read.intersection(layer.names):
            state.add(layer, layer.record(reason="it reads nothing when the model runs on the calibration text"))
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


def _plan_ranks(
    state: _Walk, plan: Plan, rows: Sequence[Sequence[Captured]], outside: Mapping[str, SecondMoments]
) -> None:
    """Fill ``state.ranks``: of layers with an override by it, of all others by the recipe's allocation."""
    recipe = state.recipe
    for layer in state.layers:
        if layer.reason is None and layer.override:
            state.ranks[layer.key] = override_rank(layer, recipe)
    tails: dict[Any, list[float]] = {}
    if recipe.allocation != "uniform":
        _price(state, plan, rows, outside, tails)
        priced = {layer.key: layer.weight.shape for layer in state.free if layer.key in tails}
        state.ranks |= _allocated(recipe, priced, tails)
    others = [layer for layer in state.free if layer.key not in tails]
    ranks = plan_uniform([layer.weight.shape for layer in others], recipe.density, recipe.rank_multiple, recipe.form)
    state.ranks |= {layer.key: r for layer, r in zip(others, ranks, strict=True)}


def _price(
    state: _Walk,
    plan: Plan,
    rows: Sequence[Sequence[Captured]],
    outside: Mapping[str, SecondMoments],
    tails: dict[Any, list[float]],
) -> None:
    """Price every layer, from one run of the dense model block by block.

    Layers that the loss does not depend on, as far as the gradients tell, get no price but the common density.
    """
    for group in plan.outside:
        _price_group(state, group, outside[group.names[0]], tails)
    for stack, captured, blocks in zip(plan.stacks, rows, plan.inside, strict=True):
        hidden = [row.hidden for row in captured]
        for index, (prefix, block, groups) in enumerate(zip(stack.prefixes, stack.blocks, blocks, strict=True)):
            moments = {group.names[0]: _empty(state.model, group.names[0]) for group in groups}
            hidden = watch_block(block, index, captured, hidden, _seen(moments, prefix))
            for group in groups:
                _price_group(state, group, moments[group.names[0]], tails)


def _price_group(state: _Walk, group: Group, moments: SecondMoments, tails: dict[Any, list[float]]) -> None:
    """Add what every rank of the group's layers costs: the estimated loss or the relative error of their outputs."""
    recipe = state.recipe
    moments.check(group.names[0])
    whitening = whiten(moments.gram, moments.count)
    for name in group.names:
        layer = state.named[name]
        if not layer.free or layer.key in tails or (recipe.allocation == "loss" and name not in state.gradients):
            continue
        if bool(layer.matrix.any()):
            check_weight(layer.matrix, layer.name)
        outputs = whitening.apply(layer.matrix.double())
        if recipe.allocation == "loss":
            outputs = output_weighting(state.gradients.get(name)).apply(outputs)
        values = torch.linalg.svdvals(outputs)
        total = float(values.square().sum()) if recipe.allocation == "relative" else 1.0
        tail = tail_losses(values, numerical_rank(values, *layer.weight.shape))
        tails[layer.key] = [loss / total if total else 0.0 for loss in tail]


def _allocated(
    recipe: Calibrated, shapes: Mapping[Any, tuple[int, int]], tails: Mapping[Any, Sequence[float]]
) -> dict[Any, int]:
    """The rank of every layer; in steps of one where no choice of multiples is small enough."""
    budget = recipe.density * sum(m * n for m, n in shapes.values())
    if not shapes:
        return {}
    for multiple in (recipe.rank_multiple, 1):
        options = [rank_options(m, n, tails[key], multiple, recipe.form) for key, (m, n) in shapes.items()]
        chosen = allocate(options, budget)
        if chosen is not None:
            return {key: option.rank for key, option in zip(shapes, chosen, strict=True)}
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
    shared = (time.perf_counter() - started) / len(group.names)
    for name in group.names:
        layer = state.named[name]
        if layer.key not in state.done:
            began = time.perf_counter()
            record = _compress_layer(state, layer, name, whitening, drift, measure)
            facts = record.details | {"input_rank": whitening.rank, "tokens": moments.count} if record.object else {}
            state.add(layer, replace(record, seconds=time.perf_counter() - began + shared, details=facts))


def _compress_layer(
    state: _Walk, layer: Layer, name: str, whitening: Whitening, drift: Tensor | None, measure: _Measure
) -> LayerRecord:
    recipe, matrix, (m, n) = state.recipe, layer.matrix, layer.weight.shape
    if not bool(matrix.any()):
        return layer.record(reason="the weight is all zeros")
    check_weight(matrix, layer.name)
    planned = state.ranks.get(layer.key, 0)
    if planned == 0:
        return layer.record(reason=_why_dense(recipe, layer))
    target = whitened_target(matrix, whitening, drift)
    weighting = OutputWeighting()
    if isinstance(recipe, Mpifa) and recipe.weighting != "none":
        weighting = output_weighting(state.gradients.get(name))
    fitted = _fit(recipe, matrix, target, whitening, weighting)
    r = min(planned, fitted.rank)
    if r == 0:
        return layer.record(reason="its outputs on the calibration text are all zeros")
    if numbers(recipe.form, m, n, r) >= m * n:
        return layer.record(reason=f"rank {r} would save nothing")
    made = pivoted(fitted, r, matrix.dtype, recipe)
    r = made.factors.rank
    achieved, least = measure(matrix, made.factors.weight(), r)
    loss = objective(fitted.truncate(r), target, whitening, weighting)
    digest = state.store.put_factors(made.factors)
    facts = {"truncation": achieved, "least_error": least, "details": {"objective": loss}}
    return factored_record(layer, made, digest, **facts)


def _fit(
    recipe: Calibrated, matrix: Tensor, target: Tensor, whitening: Whitening, weighting: OutputWeighting
) -> Truncatable:
    if isinstance(recipe, Mpifa) and recipe.solver == "alternating":
        return alternating(matrix, target, whitening)
    return closed_form(target, whitening, weighting)


def _why_dense(recipe: Calibrated, layer: Layer) -> str:
    if layer.free and recipe.allocation != "uniform":
        return "left dense by the allocation: the other layers lose less by being smaller"
    return too_small(layer, recipe)


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
