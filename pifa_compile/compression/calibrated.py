"""The walk of methods that know what layers read: block by block, group by group, in the order in which they run."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import find_stacks, runs_in_order, watching, without_cache
from pifa_compile.compression.calibration import Calibration, SelfText
from pifa_compile.compression.flows import Plan, capture, find_plan, input_width
from pifa_compile.compression.layer import distinct_layers, progress_bar, run_header
from pifa_compile.compression.memory import BUDGET, bound, choose_form, walk_size
from pifa_compile.compression.moments import FEW
from pifa_compile.compression.output_moments import OutputMoments, blockwise
from pifa_compile.compression.planning import plan_ranks
from pifa_compile.compression.solving import compress_group, walk_stack
from pifa_compile.compression.state import Walk, joint_sets_of, no_moments, unit_of
from pifa_compile.layers import LinearWeight
from pifa_compile.recipes import Calibrated, Mpifa
from pifa_compile.store import Run, Store

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
        state = Walk(model, recipe, store, writer, layers, bar, device or next(model.parameters()).device)
        for layer in layers:
            if layer.reason is not None:
                state.add(layer.record(reason=layer.reason))
        if len(state.done) < len(layers):
            with without_cache(model):
                _run(state, calibration.to(state.device))
        run = writer.finish()
        state.scratch.clear()
        return run


@torch.no_grad()
def _run(state: Walk, calibration: Calibration) -> None:
    model, first = state.model, calibration.batches[0]
    stacks = [stack for stack in find_stacks(model) if runs_in_order(model, stack, first)]
    rows_read: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        rows_read[name] = x.numel() // input_width(model.get_submodule(name))

    with watching(model, list(state.named), note):
        plan = find_plan(model, stacks, list(state.named), first)
    _warn_of_few(state, rows_read, len(calibration.batches))
    read = {name for group in plan.groups for name in group.names}
    for layer in dict.fromkeys(state.named.values()):
        if not read.intersection(layer.names):
            state.add(layer.record(reason="it reads nothing when the model runs on the calibration text"))
    state.outputs = _output_moments(state, plan, rows_read, calibration)
    outside, outside_held = no_moments(state, plan.outside), no_moments(state, plan.outside)
    rows = capture(model, plan, calibration.batches, outside, state.outputs.forward if state.outputs else None)
    held = capture(model, plan, calibration.held_out, outside_held)
    plan_ranks(state, plan, rows, outside)
    for group in plan.outside:
        name = group.names[0]
        compress_group(state, group, outside[name], outside_held[name])
    for stack, captured, captured_held, blocks in zip(plan.stacks, rows, held, plan.inside, strict=True):
        walk_stack(state, stack.prefixes, stack.blocks, blocks, captured, captured_held)


def _warn_of_few(state: Walk, rows: Mapping[str, int], batches: int) -> None:
    """rows  that each layer reads of the first batch, which is no smaller than the others"""
    width = {name: input_width(state.model.get_submodule(name)) for name in rows}
    few = [name for name, count in rows.items() if count * batches < FEW * width[name]]
    if few:
        most, first = max(rows[name] for name in few) * batches, f"{few[0]}: {width[few[0]]}"
        with state.bar.external_write_mode():
            warnings.warn(
                f"pifa: the calibration text has at most {most} tokens for {len(few)} of {len(rows)} layers, less than "
                f"half their inputs ({first}): their factors are rough, and so are the errors that are told of them; "
                "give a longer text",
                stacklevel=2,
            )


def _output_moments(state: Walk, plan: Plan, rows: Mapping[str, int], calibration: Calibration) -> OutputMoments | None:
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


def _unit_sizes(state: Walk) -> Callable[[Sequence[str]], list[int]]:
    """m of the sets of layers that the recipe joins, among names that read the same tensor."""
    return lambda names: [unit_of(state, members).shape[0] for members in joint_sets_of(state, names)]


def _say(state: Walk, text: str) -> None:
    _log.info("%s: %s", state.writer.header.run_id, text)
    if not state.bar.disable:
        state.bar.write(text, file=sys.stderr)
