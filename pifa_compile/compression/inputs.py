"""What the linear layers of a model read on a text, as second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pifa_compile.compression.blocks import Batch, Group, find_stacks, runs_in_order, without_cache
from pifa_compile.compression.flows import capture, find_plan, input_width, watch_block
from pifa_compile.compression.moments import SecondMoments


@torch.no_grad()
def input_moments(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> Iterator[tuple[Group, SecondMoments]]:
    """What the named linear modules read when the model runs on the batches, once per group that reads one tensor.

    Modules that do not run are in no group. Those of one block are in memory at a time.
    """
    with without_cache(model):
        stacks = [stack for stack in find_stacks(model) if runs_in_order(model, stack, batches[0])]
        plan = find_plan(model, stacks, names, batches[0])
        outside = _no_moments(model, plan.outside)
        rows = capture(model, plan, batches, outside)
        for group in plan.outside:
            yield group, outside[group.names[0]]
        for stack, captured, blocks in zip(plan.stacks, rows, plan.inside, strict=True):
            hidden = [row.hidden for row in captured]
            for index, (prefix, block, groups) in enumerate(zip(stack.prefixes, stack.blocks, blocks, strict=True)):
                moments = _no_moments(model, groups)
                seen = {name.removeprefix(prefix): found.add for name, found in moments.items()}
                hidden = watch_block(block, index, captured, hidden, seen)
                for group in groups:
                    yield group, moments.pop(group.names[0])


def _no_moments(model: nn.Module, groups: Sequence[Group]) -> dict[str, SecondMoments]:
    """Moments without a token yet for each group, by the name of its first layer."""
    found = {}
    for group in groups:
        module = model.get_submodule(group.names[0])
        found[group.names[0]] = SecondMoments.zeros(input_width(module), device=next(module.parameters()).device)
    return found
