"""Models that are larger than the device they are compressed on: blocks visit it one at a time.

Nothing is copied back. A parameter keeps the tensor it had before its visit, so weights come home bit by bit as they
were, a model that is mapped from a file stays mapped, and what is written to a weight during a visit is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import find_stacks


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the parameters and buffers of a module are on a device; afterwards they are what they were."""
    with _visiting(_tensors(module), device):
        yield


@contextmanager
def blocks_on_demand(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, a model runs on a device although it may not fit: each repeated block goes there for every call of it.

    What is outside of blocks is there all the time. Nothing happens to what is on the device already.
    """
    blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    inside = {id(t) for block in blocks for t in _tensors(block)}
    with ExitStack() as stack:
        stack.enter_context(_visiting((t for t in _tensors(model) if id(t) not in inside), device))
        for block in blocks:
            visit = _Visit(block, device)
            stack.callback(block.register_forward_pre_hook(visit.begin, prepend=True).remove)
            stack.callback(block.register_forward_hook(visit.end, always_call=True).remove)
        yield


class _Visit:
    """One block's visits to the device, from before its forward pass until after it, or until it fails."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._block, self._device = block, device
        self._open = ExitStack()

    def begin(self, *_: Any) -> None:
        self._open.enter_context(on_device(self._block, self._device))

    def end(self, *_: Any) -> None:
        self._open.close()


@contextmanager
def _visiting(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    home: list[tuple[Tensor, Tensor]] = []
    try:
        for t in tensors:
            if not _is_on(t, device):
                home.append((t, t.data))
                t.data = _copy(t.data, device)
        yield
    finally:
        for t, data in home:
            t.data = data


def _is_on(t: Tensor, device: torch.device) -> bool:
    return t.device == device


def _copy(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())
