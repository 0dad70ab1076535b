"""Second moments H = E[g g^T] of the loss gradient g at the outputs of linear layers, on a calibration text.

Two ways to the same numbers. ``gradient_moments`` runs the whole model forwards and backwards: its graph holds what
every layer has computed for one batch, and it needs all weights at once. ``BackwardWalk`` runs the model forwards
without a graph and writes down what enters each block; behind the last block the graph begins that gives the loss and
the gradient at that block's output; then one block at a time, from the last to the first, is run again from what was
written down, now with a graph. Only one block's weights, its graph for one batch and its moments are in memory.

m = out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile.compression.blocks import (
    Batch,
    Call,
    Stack,
    first_tensor,
    hidden_of,
    stop,
    stopping,
    token_rows,
    watching,
    without_cache,
)
from pifa_compile.compression.devices import on_device
from pifa_compile.compression.flows import Captured, input_width
from pifa_compile.compression.losses import draws, losses
from pifa_compile.compression.moments import GradientMoments, SecondMoments
from pifa_compile.store.scratch import Scratch


def gradient_moments(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], form: str = "full", seed: int = 0
) -> dict[str, GradientMoments]:
    """Sums of g g^T at the output of each named linear module, from a backward pass of the whole model.

    Modules that no gradient reaches are missing from the result. The model's parameters get no gradients.
    """
    found: dict[str, GradientMoments] = {}
    generator = torch.Generator().manual_seed(seed)
    count = draws(model, names, batches)
    mask: list[Tensor | None] = [None]
    with without_cache(model), frozen(model), _collecting(model, names, found, form, mask), torch.enable_grad():
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            _backward(losses(model, model(**batch), batch, generator, count), count)
    return {name: moments for name, moments in found.items() if moments.samples}


def _backward(found: Iterator[Tensor], count: int, after: Callable[[], None] | None = None) -> None:
    """Differentiate losses that share a graph, one by one; ``after`` each of them."""
    for number, loss in enumerate(found, 1):
        loss.backward(retain_graph=number < count)
        if after is not None:
            after()


@contextmanager
def _collecting(
    model: nn.Module,
    names: Sequence[str],
    found: dict[str, GradientMoments],
    form: str,
    mask: list[Tensor | None],
    prefix: str = "",
) -> Iterator[None]:
    """Inside, the gradients at the outputs of modules are added to ``found`` as a backward pass meets them.

    names  of linear modules, each beginning with ``prefix``, which ``model`` does not know of
    mask   its one entry is that of the batch under way: which tokens count
    """

    def hook(name: str) -> Callable[..., Tensor]:
        def watch(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            def add(gradient: Tensor) -> None:
                rows = token_rows(gradient, module, mask[0])
                if name not in found:
                    found[name] = GradientMoments(rows.shape[-1], form, rows.device)
                found[name].add(rows)

            followed = output if output.requires_grad else _leaf(output)[1]
            followed.register_hook(add)
            return followed

        return watch

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name.removeprefix(prefix))
            hooks.callback(module.register_forward_hook(hook(name)).remove)
        yield


def _leaf(t: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf that asks for a gradient, and what to compute with: a leaf must not be changed in place."""
    leaf = t.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, leaf.clone()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that a backward pass makes those of the outputs only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


# --- one block at a time ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Cut:
    """A stack cut out of the graph: hidden states enter its first block detached, and leave its last one as a leaf.

    leaf     stands for the output of the last block
    entered  called with the number of each block and the hidden states that enter it
    leaks    whether a block got another tensor that a gradient would have to go through, or returned no hidden states
    """

    stack: Stack
    entered: Callable[[int, Tensor], None]
    leaf: Tensor | None = None
    leaks: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, calls of the model are cut."""
        with ExitStack() as hooks:
            for index, block in enumerate(self.stack.blocks):
                hooks.callback(block.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
            hooks.callback(self.stack.blocks[-1].register_forward_hook(self._behind).remove)
            yield

    def gradient(self) -> Tensor:
        """The gradient at the last block's output; it begins at zero again."""
        assert self.leaf is not None, "no batch has gone through the model"
        return _taken(self.leaf)

    def _before(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            call, hidden = Call.of(arguments, keywords)
            self.leaks |= any(t.requires_grad for t in _tensors((call.arguments, call.keywords)))
            self.entered(index, hidden.detach())
            return call.filled(hidden.detach())

        return hook

    def _behind(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        self.leaf, followed = _leaf(hidden_of(output))
        if isinstance(output, Tensor):
            return followed
        self.leaks |= not isinstance(output, tuple | list)
        return (followed, *output[1:])


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for item in value.values() for t in _tensors(item))
    elif isinstance(value, tuple | list):
        yield from (t for item in value for t in _tensors(item))


def runs_apart(model: nn.Module, stack: Stack, outside: Sequence[str], batch: Batch) -> bool:
    """Whether gradients can walk a stack block by block: what the linear modules ``outside`` of it compute before it
    reaches the blocks, and the loss, through the hidden states of the first block alone."""
    begun: list[int] = []
    early: set[str] = set()

    def hook(name: str) -> Callable[..., Tensor]:
        def watch(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            followed = output if output.requires_grad else _leaf(output)[1]
            if not begun:
                followed.register_hook(lambda _: early.add(name))
            return followed

        return watch

    cut = _Cut(stack, lambda index, hidden: begun.append(index))
    with without_cache(model), frozen(model), cut.applied(), ExitStack() as hooks, torch.enable_grad():
        for name in outside:
            hooks.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        output = model(**batch)
        next(losses(model, output, batch, torch.Generator().manual_seed(0), 1)).backward()
    return not cut.leaks and not early


@dataclass(eq=False)
class BackwardWalk:
    """Gradients through a model whose blocks are visited one at a time; ``forward`` every batch, then ``blocks``.

    names    linear modules whose moments are asked for, those outside of the stack included
    device   where the blocks compute; they are moved there one at a time
    scratch  gets, of every batch, what enters each block (gone after the walk) and the gradients at the hidden states
             behind the first k blocks (draws x their shape), see ``gradients_name``
    outside  moments at the outputs of layers outside of the stack, whole after the walk
    """

    model: nn.Module
    stack: Stack
    names: Sequence[str]
    batches: Sequence[Batch]
    form: str
    seed: int
    scratch: Scratch
    device: torch.device
    outside: dict[str, GradientMoments] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._draws = draws(self.model, self.names, self.batches)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._done = 0
        self._apart = [name for name in self.names if not name.startswith(self.stack.prefixes)]

    def forward(self, batch: Batch) -> None:
        """Run the next batch: write down what enters each block, and the gradients at the last one's output."""
        number, last = self._done, len(self.stack.blocks) - 1
        self._done += 1
        cut = _Cut(self.stack, lambda index, hidden: self.scratch.put(f"inputs-{index}-{number}", {"hidden": hidden}))
        mask = [batch.get("attention_mask")]
        found: list[Tensor] = []
        with frozen(self.model), cut.applied(), torch.enable_grad(), self._collecting_outside(self._apart, mask):
            output = self.model(**batch)
            tail = losses(self.model, output, batch, self._generator, self._draws)
            _backward(tail, self._draws, lambda: found.append(cut.gradient()))
        self._put(last + 1, number, torch.stack(found))

    def blocks(
        self, rows: Sequence[Captured], readers: Sequence[Sequence[str]]
    ) -> Iterator[tuple[int, dict[str, GradientMoments], dict[str, SecondMoments]]]:
        """From the last block to the first: its number, gradient moments at the outputs of its layers, and moments of
        what those layers in ``readers`` (per block) read.

        rows  every batch as it arrives at the stack
        """
        for index in range(len(self.stack.blocks) - 1, -1, -1):
            visit = self.visit(index)
            moments = visit.empty_moments(readers[index])
            for number, row in enumerate(rows):
                inputs = self.scratch.get(f"inputs-{index}-{number}", self.device)[0]["hidden"]
                back = visit.add(row, inputs, self.gradients(index + 1, number), moments)
                if index or self._apart:
                    self._put(index, number, back)
                self.scratch.drop(f"inputs-{index}-{number}")
            yield index, visit.found, moments
        if self._apart:
            self._before_the_stack()

    def visit(self, index: int) -> BlockVisit:
        """A visit to one block."""
        prefix = self.stack.prefixes[index]
        names = [name for name in self.names if name.startswith(prefix)]
        return BlockVisit(self.stack.blocks[index], index, prefix, names, self.form, self.device)

    def _before_the_stack(self) -> None:
        """Gradients at the outputs of layers that run before the first block."""
        early = [name for name in self._apart if name not in self.outside]
        for number, batch in enumerate(self.batches if early else ()):
            arrived: list[Tensor] = []

            def keep(
                module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], kept: list[Tensor] = arrived
            ) -> None:
                kept.append(first_tensor(arguments, keywords))
                stop()

            handle = self.stack.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
            mask = [batch.get("attention_mask")]
            with without_cache(self.model), frozen(self.model), torch.enable_grad():
                with self._collecting_outside(early, mask), stopping():
                    self.model(**batch)
                handle.remove()
                if arrived[0].requires_grad:
                    _through(arrived[0], self.gradients(0, number))

    def _collecting_outside(self, names: Sequence[str], mask: list[Tensor | None]) -> Any:
        return _collecting(self.model, names, self.outside, self.form, mask)

    def gradients(self, k: int, number: int) -> Tensor:
        """Gradients of a batch at the hidden states behind the first k blocks, draws x their shape."""
        return self.scratch.get(gradients_name(k, number), self.device)[0]["gradients"]

    def _put(self, k: int, number: int, gradients: Tensor) -> None:
        self.scratch.put(gradients_name(k, number), {"gradients": gradients})


def gradients_name(k: int, number: int) -> str:
    """The name in the scratch of the gradients of one batch behind the first k blocks."""
    return f"gradients-{k}-{number}"


@dataclass(eq=False)
class BlockVisit:
    """One block run again with a graph, batch by batch: moments at the outputs of its layers are in ``found``.

    names  linear modules of the block, each beginning with ``prefix``
    """

    block: nn.Module
    index: int
    prefix: str
    names: Sequence[str]
    form: str
    device: torch.device
    found: dict[str, GradientMoments] = field(init=False, default_factory=dict)

    def empty_moments(self, names: Sequence[str]) -> dict[str, SecondMoments]:
        """Moments of what modules of the block read, before any token."""
        modules = {name: self.block.get_submodule(name.removeprefix(self.prefix)) for name in names}
        return {name: SecondMoments.zeros(input_width(m), device=self.device) for name, m in modules.items()}

    def add(
        self, row: Captured, hidden: Tensor, gradients: Tensor, moments: Mapping[str, SecondMoments] | None = None
    ) -> Tensor:
        """Add one batch, and to ``moments`` what those layers read; returns the gradients at the block's input.

        gradients  at the block's output, draws x shape of the hidden states, as what is returned
        """

        def note(name: str, x: Tensor) -> None:
            module = self.block.get_submodule(name)
            read[f"{self.prefix}{name}"].add(token_rows(x, module, row.mask))

        read = moments or {}
        leaf, states = _leaf(hidden)
        back: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(on_device(self.block, self.device))
            stack.enter_context(frozen(self.block))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(watching(self.block, [name.removeprefix(self.prefix) for name in read], note))
            stack.enter_context(_collecting(self.block, self.names, self.found, self.form, [row.mask], self.prefix))
            output = row.calls[self.index].run(self.block, states)
            _through(output, gradients, lambda: back.append(_taken(leaf)))
        return torch.stack(back)


def _through(output: Tensor, gradients: Tensor, after: Callable[[], None] | None = None) -> None:
    """Send each of the gradients back through the graph of ``output``; ``after`` each of them."""
    for number, gradient in enumerate(gradients, 1):
        output.backward(gradient, retain_graph=number < len(gradients))
        if after is not None:
            after()


def _taken(leaf: Tensor) -> Tensor:
    """The gradient of a leaf, which begins at zero again."""
    found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    leaf.grad = None
    return found
