"""A weight that changes after compilation must not be served from its old factors.

What is caught: a new parameter in the place of the old (an identity guard of Dynamo), in-place edits and
``load_state_dict`` (the tensor's version), and ``weight.data = ...`` (its address). An edit through ``weight.data``
itself, such as ``weight.data.mul_(2)``, leaves no trace and cannot be seen; nor can edits of inference tensors.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.errors import StaleWeightError

log = logging.getLogger(__name__)
POLICIES = ("check", "error", "off")


class Watch:
    """The state of weights at compile time, by name; holds no weight alive."""

    def __init__(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        self._names = [name for name, _ in weights]
        self._weights = [weakref.ref(t) for _, t in weights]
        self._states = [weight_state(t) for _, t in weights]
        self.fresh = True

    def changed(self) -> str | None:
        """The name of the first weight that is not as it was; a few microseconds for hundreds of weights."""
        for reference, state, name in zip(self._weights, self._states, self._names, strict=True):
            weight = reference()
            if weight is None or weight_state(weight) != state:
                return name
        return None


def weight_state(weight: Tensor) -> tuple[int, int]:
    """What a change of the weight's content changes: its version (-1 for an inference tensor) and its address."""
    return (-1 if weight.is_inference() else weight._version, weight.data_ptr())


class DenseGraph:
    """The graph as it was captured, to run while a recompilation is due; shares all memory with the model."""

    def __init__(self, gm: fx.GraphModule) -> None:
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        output = graph.graph_copy(gm.graph, copies)
        graph.output(output)
        for node in graph.nodes:
            node.meta = {}
        self._run = fx.GraphModule(gm, graph)
        self._placeholders = {old: new for old, new in copies.items() if old.op == "placeholder"}

    def bind(self, values: dict[fx.Node, Any], kept: Sequence[fx.Node]) -> Callable[..., Any]:
        """A callable that takes the values of the ``kept`` placeholders; the others are the model's own tensors."""
        own = {node: weakref.ref(value) for node, value in values.items() if node not in kept}

        def run(*arguments: Any) -> Any:
            given = dict(zip(kept, arguments, strict=True))
            return self._run(*(given[n] if n in given else own[n]() for n in self._placeholders))

        return run


def guarded(compiled: Callable[..., Any], dense: Callable[..., Any], watch: Watch, policy: str) -> Callable[..., Any]:
    """``compiled`` while the watched weights are as they were; afterwards what the policy says.

    check  run the dense graph with the weights as they are, once, and have Dynamo recompile before the next call
    error  raise StaleWeightError
    """

    def run(*arguments: Any) -> Any:
        name = watch.changed()
        if name is None:
            return compiled(*arguments)
        if policy == "error":
            raise StaleWeightError(name)
        if watch.fresh:
            log.warning("%s has changed since it was compiled: this call runs dense, the next one recompiles", name)
        watch.fresh = False
        return dense(*arguments)

    return run


def guard_identity(weights: Sequence[fx.Node]) -> None:
    """Have Dynamo recompile when a placeholder's parameter is another object.

    Under every policy: without it, blocks of one class would be served the factors of the first of them.
    """
    for node in weights:
        _torch.guard_identity(node)
    if weights:
        _torch.guard_owner(weights[0])


def guard_change(weights: Sequence[fx.Node], watch: Watch) -> None:
    """Have Dynamo recompile when the watch is no longer fresh."""
    if weights:
        _torch.guard_condition(weights[0], lambda: watch.fresh)
