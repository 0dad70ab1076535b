"""Two flows through a model, one block at a time: as it is, and with the layers that are compressed already.

Only the hidden states between two blocks are kept, of every batch and of both flows, in the model's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import (
    Batch,
    Call,
    Group,
    InputGroups,
    Stack,
    stop,
    stopping,
    token_rows,
    watching,
    without_cache,
)
from pifa_compile.compression.moments import SecondMoments
from pifa_compile.layers import as_matrix, layout_of, matrix_shape

#: What linear layers of one block read is kept for all groups at once up to this size.
CACHED_BYTES = 1 << 29


@dataclass(eq=False)
class Captured:
    """One batch as it arrives at a stack: the hidden states, how each block was called, and which tokens count."""

    hidden: Tensor
    calls: list[Call]
    mask: Tensor | None

    def take(self) -> Tensor:
        """The hidden states, which are not kept here any longer: they would be a third flow beside two."""
        hidden, self.hidden = self.hidden, self.hidden.new_empty(0)
        return hidden


@dataclass(eq=False)
class Plan:
    """What runs where.

    outside  groups of linear layers that are in no block
    inside   per stack, per block, the groups in it
    """

    stacks: list[Stack]
    outside: list[Group]
    inside: list[list[list[Group]]]

    @property
    def groups(self) -> Iterator[Group]:
        """All groups: outside of blocks first, then block by block."""
        yield from self.outside
        for blocks in self.inside:
            for groups in blocks:
                yield from groups


@torch.no_grad()
def find_plan(model: nn.Module, stacks: Sequence[Stack], names: Sequence[str], batch: Batch) -> Plan:
    """The groups among the named linear modules, by block; found with one call of the model."""
    places = {name: (s, b) for name in names for s, b in [_place(stacks, name)]}
    found: dict[tuple[int, int], InputGroups] = {}

    def note(name: str, x: Tensor) -> None:
        found.setdefault(places[name], InputGroups()).note(name, x)

    with without_cache(model), watching(model, names, note):
        model(**batch)
    inside = [
        [found[s, b].groups() if (s, b) in found else [] for b in range(len(stack.blocks))]
        for s, stack in enumerate(stacks)
    ]
    return Plan(list(stacks), found[-1, -1].groups() if (-1, -1) in found else [], inside)


def _place(stacks: Sequence[Stack], name: str) -> tuple[int, int]:
    """(stack, block) that a layer is in; (-1, -1) outside of all."""
    for s, stack in enumerate(stacks):
        for b, prefix in enumerate(stack.prefixes):
            if name.startswith(prefix):
                return s, b
    return -1, -1


@torch.no_grad()
def capture(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    outside: Mapping[str, SecondMoments],
    forward: Callable[[Batch], object] | None = None,
) -> list[list[Captured]]:
    """Run the model on every batch; returns, per stack and batch, what arrived at its first block.

    outside  moments to be added to on the way, by the name of the first layer of a group outside of blocks
    forward  runs the model on a batch, and what else is to be done with it; default: the model
    """
    found: list[list[Captured]] = [[] for _ in plan.stacks]
    with without_cache(model), ExitStack() as hooks:
        current: list[Batch] = [{}]

        def note(name: str, x: Tensor) -> None:
            outside[name].add(token_rows(x, model.get_submodule(name), current[0].get("attention_mask")))

        hooks.enter_context(watching(model, list(outside), note))
        for stack, rows in zip(plan.stacks, found, strict=True):
            for index, block in enumerate(stack.blocks):
                hook = _capture_hook(rows, index, current)
                hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            current[0] = batch
            if forward is None:
                model(**batch)
            else:
                forward(batch)
    return found


def _capture_hook(rows: list[Captured], index: int, current: list[Batch]) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        call, hidden = Call.of(arguments, keywords)
        if index == 0:
            rows.append(Captured(hidden.detach(), [], current[0].get("attention_mask")))
        rows[-1].calls.append(call)

    return hook


@torch.no_grad()
def watch_block(
    block: nn.Module, index: int, rows: Sequence[Captured], hidden: Sequence[Tensor], seen: Mapping[str, Any]
) -> list[Tensor]:
    """Run a block on every batch and return its outputs; ``seen[name](x)`` gets the token rows that a layer reads."""
    outputs = []
    with ExitStack() as hooks:
        mask: list[Tensor | None] = [None]

        def note(name: str, x: Tensor) -> None:
            seen[name](token_rows(x, block.get_submodule(name), mask[0]))

        hooks.enter_context(watching(block, list(seen), note))
        for row, states in zip(rows, hidden, strict=True):
            mask[0] = row.mask
            outputs.append(row.calls[index].run(block, states))
    return outputs


@torch.no_grad()
def inputs_of(block: nn.Module, name: str, call: Call, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Token rows that the layer ``name`` of a block reads in one call; what comes after its last call is not run.

    A layer that runs several times in a block gives the rows of its first call.
    """
    found: list[Tensor] = []

    def note(_: str, x: Tensor) -> None:
        found.append(token_rows(x, block.get_submodule(name), mask))
        stop()

    with watching(block, [name], note), stopping():
        call.run(block, hidden)
    return found[0]


class TwoFlows:
    """Both flows through one block, which is here as it is and in a copy whose layers are replaced one by one.

    names  first layers of the groups whose moments will be asked for. What they read in the dense flow is kept from
           one run of the block if it fits into CACHED_BYTES, else the block is run again for each.
    dense, changed  hidden states at the entrance of the block
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        rows: Sequence[Captured],
        dense: list[Tensor],
        changed: list[Tensor],
        names: Sequence[str],
    ) -> None:
        self._block, self._changed_block = block, copy.deepcopy(block)
        self._index, self._rows, self._dense, self._changed = index, rows, dense, changed
        self._read: dict[str, list[Tensor]] = {}
        widths = sum(input_width(block.get_submodule(name)) for name in names)
        if sum(t.numel() // t.shape[-1] * t.element_size() for t in dense) * widths <= CACHED_BYTES:
            self._read = {name: [] for name in names}
            seen = {name: kept.append for name, kept in self._read.items()}
            self._outputs = watch_block(block, index, rows, dense, seen)
        else:
            self._outputs = watch_block(block, index, rows, dense, {})

    def moments(self, name: str) -> SecondMoments:
        """Moments of what the layer ``name`` of this block reads in both flows."""
        n = input_width(self._block.get_submodule(name))
        found = SecondMoments.zeros(n, two_flows=True, device=self._changed[0].device)
        for i, row in enumerate(self._rows):
            call = row.calls[self._index]
            now = inputs_of(self._changed_block, name, call, self._changed[i], row.mask)
            before = (
                self._read[name][i]
                if name in self._read
                else inputs_of(self._block, name, call, self._dense[i], row.mask)
            )
            found.add(now, before)
        self._read.pop(name, None)
        return found

    def replace(self, name: str, weight: Tensor) -> None:
        """From now on the layer ``name`` of the changed block has this weight (m x n)."""
        set_matrix(self._changed_block.get_submodule(name), weight)

    def outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The hidden states that leave the block: those of the dense flow, then those of the changed one.

        They take the place of those that entered it.
        """
        for i, row in enumerate(self._rows):
            self._dense[i] = self._outputs[i]
            self._changed[i] = watch_block(self._changed_block, self._index, [row], [self._changed[i]], {})[0]
        return self._dense, self._changed


def input_width(module: nn.Module) -> int:
    """n of a linear module."""
    layout = layout_of(module)
    assert layout is not None, "only linear modules have an input width"
    assert isinstance(module.weight, Tensor)
    return matrix_shape(module.weight, layout)[1]


@torch.no_grad()
def set_matrix(module: nn.Module, weight: Tensor) -> None:
    """Write an m x n matrix into a linear module's weight, whatever its layout."""
    layout = layout_of(module)
    assert layout is not None, "only linear modules have a matrix"
    parameter = module.weight
    assert isinstance(parameter, Tensor)
    as_matrix(parameter, layout).copy_(weight)
