"""Which layers are joined, and what rank each of them has: priced over the whole model, or by one density."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pifa_compile.compression.allocation import allocate_choices, rank_options, tail_losses
from pifa_compile.compression.blocks import Group
from pifa_compile.compression.devices import on_device
from pifa_compile.compression.flows import Captured, Plan, watch_block
from pifa_compile.compression.joint import alternatives, first_way
from pifa_compile.compression.layer import override_rank
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.compression.mpifa import output_weighting
from pifa_compile.compression.ranks import plan_uniform
from pifa_compile.compression.state import Walk, collectors, joint_sets_of, no_moments, settle, unit_of
from pifa_compile.compression.whitening import Whitening, whiten
from pifa_compile.errors import RecipeError
from pifa_compile.pivoting import check_weight, numerical_rank


@dataclass(frozen=True, eq=False)
class _Ways:
    """Layers that read the same tensor, and every way to part them into units that share a factorization.

    tails  what every rank of a unit costs, by the names of its layers
    """

    ways: list[list[tuple[str, ...]]]
    tails: dict[tuple[str, ...], list[float]]


def plan_ranks(
    state: Walk, plan: Plan, rows: Sequence[Sequence[Captured]], outside: Mapping[str, SecondMoments]
) -> None:
    """Fill ``state.units`` and ``state.ranks``: of layers with an override by it, else by the recipe's allocation."""
    recipe, outputs = state.recipe, state.outputs
    if outputs is not None and outputs.plan is not None:
        state.gradients = outputs.kept
        for names, r in outputs.plan:
            settle(state, names, r)
        return
    for name, layer in state.named.items():
        if layer.override:
            settle(state, (name,), override_rank(layer, recipe))
    priced = _price(state, plan, rows, outside) if recipe.allocation != "uniform" or outputs is not None else []
    if recipe.allocation != "uniform":
        _allocate(state, priced)
    others: list[tuple[str, ...]] = []
    for group in plan.groups:
        left = [name for name in group.names if state.named[name].key not in state.units]
        others += first_way(left, joint_sets_of(state, left))
    others = list({unit_of(state, names).first.key: names for names in reversed(others)}.values())[::-1]
    shapes = [unit_of(state, names).shape for names in others]
    ranks = plan_uniform(shapes, recipe.density, recipe.rank_multiple, recipe.form)
    for names, r in zip(others, ranks, strict=True):
        settle(state, names, r)
    if outputs is not None:
        units = dict.fromkeys(state.units.values())
        outputs.finish([[[layer.name for layer in unit.layers], state.ranks[unit.first.key]] for unit in units])


def _price(
    state: Walk, plan: Plan, rows: Sequence[Sequence[Captured]], outside: Mapping[str, SecondMoments]
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
    state: Walk, plan: Plan, rows: Sequence[Sequence[Captured]], wanted: bool
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
            moments = no_moments(state, groups)
            with on_device(block, state.device):
                hidden = watch_block(block, index, captured, hidden, collectors(moments, prefix))
            yield groups, moments


def _price_group(state: Walk, group: Group, moments: SecondMoments, found: list[_Ways]) -> None:
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
    ways = alternatives(list(outputs), joint_sets_of(state, list(outputs)))
    tails: dict[tuple[str, ...], list[float]] = {}
    for names in dict.fromkeys(names for way in ways for names in way):
        stacked = torch.cat([outputs[name] for name in names])
        values = torch.linalg.svdvals(stacked)
        tails[names] = tail_losses(values, numerical_rank(values, *stacked.shape))
    if outputs:
        found.append(_Ways(ways, tails))


def _priced_outputs(state: Walk, name: str, whitening: Whitening) -> Tensor:
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


def _allocate(state: Walk, priced: Sequence[_Ways]) -> None:
    """Settle the units and ranks of all priced layers; in steps of one where no choice of multiples is small enough."""
    recipe = state.recipe
    layers = [state.named[name] for ways in priced for names in ways.ways[0] for name in names]
    budget = recipe.density * sum(layer.weight.shape[0] * layer.weight.shape[1] for layer in layers)
    for multiple in (recipe.rank_multiple, 1):
        choices = [
            [
                [rank_options(*unit_of(state, names).shape, ways.tails[names], multiple, recipe.form) for names in way]
                for way in ways.ways
            ]
            for ways in priced
        ]
        chosen = allocate_choices(choices, budget)
        if chosen is not None:
            for ways, (taken, options) in zip(priced, chosen, strict=True):
                for names, option in zip(ways.ways[taken], options, strict=True):
                    settle(state, names, option.rank)
            return
    raise RecipeError(f"no choice of ranks keeps {recipe.density:g} of the numbers of these layers; raise the density")
