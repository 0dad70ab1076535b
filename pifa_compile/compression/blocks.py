"""The repeated blocks of a model and the linear layers in them that read the same tensor, found by running it.

No table of architectures: blocks are a list of modules of one class that hold linear layers, and a group is whatever
linear layers received one and the same tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.layers import layout_of

#: What a model is called with.
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Stack:
    """A list of blocks that a model runs one after the other; ``name`` is that of the list."""

    name: str
    blocks: tuple[nn.Module, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of the layers of each block begin with."""
        return tuple(f"{self.name}.{index}." if self.name else f"{index}." for index in range(len(self.blocks)))


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost lists of two or more modules of one class that each hold a linear layer, in module order."""
    found: list[Stack] = []
    for name, module in model.named_modules():
        blocks = tuple(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else ()
        inside = any(not stack.name or name.startswith(f"{stack.name}.") for stack in found)
        if len(blocks) > 1 and not inside and len({type(block) for block in blocks}) == 1 and all(map(_inner, blocks)):
            found.append(Stack(name, blocks))
    return found


@torch.no_grad()
def runs_in_order(model: nn.Module, stack: Stack, batch: Batch) -> bool:
    """Whether the model calls each block once, in order, and hands each one's output to the next as it is."""
    called: list[int] = []
    states: list[tuple[Tensor, Tensor]] = []

    def hook(index: int) -> Callable[..., None]:
        def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            called.append(index)
            states.append((first_tensor(arguments, keywords), hidden_of(output)))

        return note

    with without_cache(model), ExitStack() as hooks:
        for index, block in enumerate(stack.blocks):
            hooks.callback(block.register_forward_hook(hook(index), with_kwargs=True).remove)
        model(**batch)
    handed = all(
        before.data_ptr() == after.data_ptr() and before.shape == after.shape
        for (_, before), (after, _) in itertools.pairwise(states)
    )
    return called == list(range(len(stack.blocks))) and handed


def _inner(block: nn.Module) -> bool:
    """Whether a block holds linear layers, and is not one itself."""
    return layout_of(block) is None and any(layout_of(module) is not None for module in block.modules())


@dataclass(frozen=True)
class Group:
    """Linear layers that receive the same tensor, by module name, in the order in which they run."""

    names: tuple[str, ...]


class InputGroups:
    """Collects which modules received which tensor while the model runs inside ``watching``."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._alive: list[Tensor] = []  # no storage may be used twice while its address tells tensors apart

    def note(self, name: str, x: Tensor) -> None:
        """Module ``name`` reads x. Its first call counts."""
        self._alive.append(x)
        place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape[-1], x.numel(), x.dtype, x._version)
        self._seen.setdefault(name, place)

    def groups(self) -> list[Group]:
        """The groups in the order of their first module."""
        by_place: dict[tuple[Any, ...], list[str]] = {}
        for name, place in self._seen.items():
            by_place.setdefault(place, []).append(name)
        return [Group(tuple(names)) for names in by_place.values()]


@torch.no_grad()
def find_groups(model: nn.Module, names: Sequence[str], batch: Batch) -> list[Group]:
    """The groups among the named linear modules, from one call of the model, in the order in which they run."""
    found = InputGroups()
    with watching(model, names, found.note):
        model(**batch)
    return found.groups()


@contextmanager
def watching(model: nn.Module, names: Sequence[str], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``note(name, input)`` before each call of one of the named modules."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments, keywords: note(name, first_tensor(arguments, keywords))

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def first_tensor(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The first floating point tensor that a module is called with."""
    for value in (*arguments, *keywords.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise TypeError("a module was called without a floating point tensor")


def token_rows(x: Tensor, module: nn.Module, mask: Tensor | None = None) -> Tensor:
    """What a linear module reads or writes as rows, one per token (N x features), padding left out.

    mask  batch x tokens, nonzero for tokens that count; it applies where x has these leading dimensions
    """
    return rows_of(x, -1 - _spatial(module) if layout_of(module) == "conv1x1" else -1, mask)


def rows_of(x: Tensor, channel: int = -1, mask: Tensor | None = None) -> Tensor:
    """``token_rows`` of a tensor whose features are in the dimension ``channel``, counted from the end."""
    x = x.movedim(channel, -1)
    rows = x.reshape(-1, x.shape[-1])
    fits = mask is not None and (x.shape[:-1] == mask.shape or (x.dim() == 2 and rows.shape[0] == mask.numel()))
    return rows[mask.flatten().bool()] if fits and mask is not None else rows


def _spatial(module: nn.Module) -> int:
    weight = module._parameters["weight"]
    return 0 if weight is None else weight.dim() - 2


# --- one block at a time ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """How a block was called: everything but the hidden states, and where those go."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    place: int | str

    @classmethod
    def of(cls, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Call, Tensor]:
        """The call without its hidden states, and the hidden states: its first floating point tensor."""
        hidden = first_tensor(arguments, keywords)
        for index, value in enumerate(arguments):
            if value is hidden:
                rest = (*arguments[:index], None, *arguments[index + 1 :])
                return cls(rest, dict(keywords), index), hidden
        key = next(key for key, value in keywords.items() if value is hidden)
        return cls(arguments, {k: v for k, v in keywords.items() if k != key}, key), hidden

    def filled(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords of the call on other hidden states."""
        if isinstance(self.place, int):
            return (*self.arguments[: self.place], hidden, *self.arguments[self.place + 1 :]), dict(self.keywords)
        return self.arguments, {**self.keywords, self.place: hidden}

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output on other hidden states."""
        arguments, keywords = self.filled(hidden)
        return hidden_of(block(*arguments, **keywords))


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a block returns: all of it, or its first part."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


class _Stop(Exception):
    """Ends a forward pass once all that was wanted has been seen."""


@contextmanager
def stopping() -> Iterator[None]:
    """A block run inside may be ended early by ``stop``."""
    with suppress(_Stop):
        yield


def stop() -> None:
    """End the forward pass that runs inside ``stopping``."""
    raise _Stop


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without a key-value cache; both are put back."""
    config, training = getattr(model, "config", None), model.training
    cached = getattr(config, "use_cache", None)
    if cached is not None:
        config.use_cache = False  # type: ignore[union-attr]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if cached is not None:
            config.use_cache = cached  # type: ignore[union-attr]
