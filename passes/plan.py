"""What the passes know of one graph: its linear layers, and what becomes of each.

m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import Factors
from pifa_compile.layers import Layout, matrix_shape
from pifa_compile.options import Settings
from pifa_compile.store import LayerRecord, Run

if TYPE_CHECKING:
    from pifa_compile.passes.pairs import Pair


@dataclass
class LinearSite:
    """One call of a linear layer in the graph.

    node     the call; after ``replace`` the node that took its place
    x        the activations; channel: their contracted dimension, from the end (-1 but for convolutions)
    weight   the placeholder of the weight, None where the weight is no parameter; through: its transposes
    name     the layer's name in the traced frame: a label, not a key
    source   the user's own line, "file.py:12 code"
    reason   why the layer stays dense; None while nothing speaks against replacing it
    row_order  of a layer that came as ``pifa::linear``: its placeholder
    digest   of the weight's content, by which the store knows it
    inner    the first half of a low-rank pair whose second half this is, once both became one layer
    folded   whether this is such a first half: it counts with the second
    rows     where its rows begin and end in factors that it shares with other layers; None where they are its own
    shares_pivots  whether the pivot rows it came with were counted with a layer before it
    order_taken  whether its row order is in the graph as constants, and no longer as its own tensor
    bias_taken  whether the graph holds the bias in another order, so that the layer's own must stay as it is
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    parameter: Tensor | None
    name: str
    source: str
    layout: Layout = "out_in"
    channel: int = -1
    through: tuple[fx.Node, ...] = ()
    row_order: fx.Node | None = None
    reason: str | None = None
    digest: str | None = None
    record: LayerRecord | None = None
    factors: Factors | None = None
    inner: LinearSite | None = None
    folded: bool = False
    rows: tuple[int, int] | None = None
    shares_pivots: bool = False
    order_taken: bool = False
    bias_taken: bool = False

    @property
    def open(self) -> bool:
        """Whether nothing has yet been found that speaks against replacing the layer."""
        return self.reason is None and self.parameter is not None

    @property
    def prepared(self) -> bool:
        """Whether the layer came with factors of its own (a PifaLinear)."""
        return self.row_order is not None

    @property
    def shape(self) -> tuple[int, int] | None:
        """(m, n), where the weight is a matrix; of the product, where a pair became one layer."""
        if self.inner is not None and self.factors is not None:
            return self.factors.shape
        if self.parameter is None or self.parameter.dim() < 2:
            if self.factors is None:
                return None
            m, n = self.factors.shape
            return (m, n) if self.rows is None else (self.rows[1] - self.rows[0], n)
        return matrix_shape(self.parameter, self.layout)

    @property
    def rank(self) -> int | None:
        """The rank of the factors, of those in the store if none were loaded yet."""
        if self.factors is not None:
            return self.factors.rank
        return self.record.rank if self.record is not None and self.record.object else None

    def numbers(self) -> tuple[int, int]:
        """Parameters before and after (the same where the layer stays dense)."""
        if self.shape is None or self.folded:
            return (0, 0)
        m, n = self.shape
        if self.inner is not None and self.factors is not None:
            return sum(s.parameter.numel() for s in (self, self.inner) if s.parameter is not None), self.factors.numbers
        if self.rows is not None and self.reason is None and self.record is not None:
            start, stop = (self.record.numbers * row // self.record.shape[0] for row in self.rows)
            return m * n, stop - start
        if self.factors is not None:
            return m * n, self.factors.numbers - (self.factors.rank * n if self.shares_pivots else 0)
        taken = self.reason is None and self.record is not None and self.record.object is not None
        return m * n, self.record.numbers if taken and self.record is not None else m * n


@dataclass
class Plan:
    """All linear layers of one graph, in order, and the run that their factors come from."""

    sites: list[LinearSite] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    run: Run | None = None

    def weights(self) -> dict[fx.Node, LinearSite]:
        """The first open site of every weight: a weight with several call sites has one set of factors."""
        found: dict[fx.Node, LinearSite] = {}
        for site in self.sites:
            if site.open and site.weight is not None:
                found.setdefault(site.weight, site)
        return found

    def watched(self, values: dict[fx.Node, Any]) -> dict[fx.Node, Tensor]:
        """The placeholders whose values the rewritten graph has taken in: they must stay as they are."""
        taken = [site for site in self.sites if site.factors is not None]
        nodes = [node for site in taken for node in (site.weight, site.row_order if site.order_taken else None)]
        for site in taken:
            if site.inner is not None:  # both biases were folded too
                nodes += [site.inner.weight, site.inner.bias, site.bias]
            elif site.bias_taken:
                nodes.append(site.bias)
        return {node: values[node] for node in nodes if node is not None and isinstance(values.get(node), Tensor)}

    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of every site that stays dense."""
        return tuple((s.name, s.reason) for s in self.sites if s.reason is not None)


@dataclass(frozen=True)
class Context:
    """What a pass may look at besides the graph.

    values      the real value of every placeholder
    find_run    the compression run for these weights (open sites), or None; may compress
    load        factors of a record, in the dtype and on the device of a tensor
    factor_pairs  factors of the products of pairs, with folded biases
    """

    settings: Settings
    values: dict[fx.Node, Any]
    plan: Plan
    find_run: Callable[[Sequence[LinearSite]], Run | None]
    load: Callable[[LayerRecord, Tensor], Factors]
    factor_pairs: Callable[[Sequence[Pair]], Sequence[Factors]]


@dataclass(frozen=True)
class PassResult:
    """What one pass did: sites it looked at, things it changed, and the reasons it gave for the rest."""

    matched: int
    changed: int
    skipped: tuple[tuple[str, str], ...] = ()


ORIGIN = "pifa_origin"
CLOSED = "pifa_closed"  # in the meta of a call with linear layers inside: why it could not be written out


@contextmanager
def in_place_of(old: fx.Node) -> Iterator[fx.Graph]:
    """Insert nodes before ``old``; they get its stack trace, so that dumps and profiles keep the user's own line.

    ``meta[ORIGIN]`` of each is the name of the captured node in whose place it was written, through several passes.
    """
    graph = old.graph
    first = old.prev
    with graph.inserting_before(old):
        yield graph
    node = first.next
    while node is not old:
        node.meta.setdefault("stack_trace", old.meta.get("stack_trace"))
        node.meta.setdefault(ORIGIN, old.meta.get(ORIGIN, old.name))
        node = node.next


def take_place(new: fx.Node, old: fx.Node) -> None:
    """Let ``new`` stand where ``old`` stood, with all that is known of its value, and erase ``old``."""
    known = ("example_value", "stack_trace", "nn_module_stack")
    new.meta.update({key: old.meta[key] for key in known if key in old.meta})
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def argument(node: fx.Node, position: int, name: str) -> fx.Node | None:
    """The node given to a call by position or by name; None where it is absent or no node."""
    found = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return found if isinstance(found, fx.Node) else None


def cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node in ``dtype``; itself where it already has it."""
    value = _torch.fake_value(node)
    if isinstance(value, Tensor) and value.dtype == dtype:
        return node
    made = graph.call_method("to", (node, dtype))
    if isinstance(value, Tensor):
        made.meta["example_value"] = value.to(dtype)
    return made
