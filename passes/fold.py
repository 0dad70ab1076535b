"""Let the row order of a layer disappear where its readers can take the features in any order.

    before   u = pifa::linear(x, P_u, C_u, order_u, b);   h = gelu(u); y = pifa::linear(h, P_d, C_d, order_d)
    after    u = pifa::linear(x, P_u, C_u, 0..m-1, b[order_u]); h = gelu(u)
             y = pifa::linear(h, P_d[:, order_u], C_d, order_d)

Between the layers that write the m features and those that read them stand only operations on single features
(activations, products, sums, casts), so one order of the features is as good as another: it moves into the columns of
the readers, which is exact up to the order of a sum.

Two writers (gate and up) need no pivots in common to have an order in common. Pivots may stand in any order among
themselves, and so may the other rows, so the features are put in the order

    pivots of gate alone | pivots of both | pivots of up alone | pivots of neither
    gate: y_p ........................... | y_np .................................
    up:   y_np, its first part | y_p ...................... | y_np, the rest

and each output is a concatenation of slices. Of three writers and more the others are brought into that order by one
gather each, in place of their own. Layers that were factored together are such writers too: each is a range of rows of
one operator, and its order is that of its range.

Not folded: the residual stream, which norms and the next blocks read in order; values of attention, as a head is a
contiguous range of features over which a layer's pivots are spread; and prepared layers, which own their factors, so
that a folded copy would be a second one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import PairFactors, PifaFactors
from pifa_compile.kernels import op
from pifa_compile.loaded import derived
from pifa_compile.passes.plan import Context, LinearSite, PassResult, argument, in_place_of
from pifa_compile.passes.replace import Buffers


@dataclass(frozen=True)
class Writer:
    """A layer that writes features: rows ``start`` to ``stop`` of what the operator of the sites writes."""

    sites: tuple[LinearSite, ...]
    start: int
    stop: int

    @property
    def pivots(self) -> Tensor | None:
        """The features that are pivots, in their order in y_p; None for a pair, which writes any order alike."""
        factors = self.sites[0].factors
        if not isinstance(factors, PifaFactors):
            return None
        rows = factors.row_order[: factors.rank].to(torch.int64)
        return rows[(rows >= self.start) & (rows < self.stop)] - self.start


@dataclass
class Region:
    """Features in one order, by node: the layers that write them, the calls that read them, and all between."""

    writers: dict[fx.Node, Writer] = field(default_factory=dict)
    readers: dict[fx.Node, LinearSite] = field(default_factory=dict)
    nodes: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class _Layers:
    """The factored layers of a graph: by the node with the output, and by the call that reads the input."""

    writing: Mapping[fx.Node, Writer]
    reading: Mapping[fx.Node, LinearSite]


def fold(gm: fx.GraphModule, context: Context) -> PassResult:
    """Fold the order of every region of features that only factored layers write and read."""
    sites = [s for s in context.plan.sites if s.factors is not None and not s.prepared]
    calls = Counter(s.weight for s in sites)
    once = [s for s in sites if s.weight is None or calls[s.weight] == 1]  # others would need a copy for each order
    writing = {node: writer for s in sites if (shown := _writing(s, sites)) for node, writer in shown.items()}
    layers = _Layers(writing, {_reading(s): s for s in once if s.rows is None})
    buffers, seen = Buffers(gm), set[fx.Node]()
    skipped: list[tuple[str, str]] = []
    matched = folded = 0
    for node, writer in writing.items():
        if node in seen or not isinstance(writer.sites[0].factors, PifaFactors):
            continue
        matched += 1
        region = Region()
        reason = _grow(region, node, layers)
        if reason is None:
            _fold(region, _common_order(region), buffers, context)
            seen |= region.nodes
            folded += 1
        else:
            skipped.append((writer.sites[0].name, reason))
    return PassResult(matched, folded, tuple(skipped))


def _writing(site: LinearSite, sites: Sequence[LinearSite]) -> dict[fx.Node, Writer]:
    """The node with the layer's own output: its operator, or what reads its rows out of one that it shares."""
    if site.rows is None:
        m = site.factors.shape[0] if site.factors is not None else 0
        return {site.node: Writer((site,), 0, m)}
    start, stop = site.rows
    sharing = tuple(other for other in sites if other.node is site.node)
    own = [user for user in site.node.users if user.target == "narrow" and user.args[1:] == (-1, start, stop - start)]
    pivoted = isinstance(site.factors, PifaFactors) and site.node.target is op.linear
    return {user: Writer(sharing, start, stop) for user in own[:1]} if pivoted and len(own) == 1 else {}


def _reading(site: LinearSite) -> fx.Node:
    """The call that reads the layer's input: of a pair, its first half."""
    return site.node.all_input_nodes[0] if isinstance(site.factors, PairFactors) else site.node


# --- what belongs together -------------------------------------------------------------------------------------------


def _grow(region: Region, start: fx.Node, layers: _Layers) -> str | None:
    """Fill the region with all that must have the order of ``start``; a reason if something in it needs its own."""
    features = _features(start)
    if features is None or features == 1:
        return "no known number of features"
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node in region.nodes:
            continue
        region.nodes.add(node)
        if _features(node) != features:
            return f"{_name(node)} has another number of features"
        if node in layers.writing:
            region.writers[node] = layers.writing[node]
        elif not _by_feature(node):
            return f"{_name(node)} works on more than single features"
        else:
            waiting += [given for given in node.all_input_nodes if _features(given) != 1]
        for user in node.users:
            if user in layers.reading and _is_its_x(node, user):
                region.readers[user] = layers.reading[user]
            elif _features(user) == features and user not in layers.writing:
                waiting.append(user)
            elif _name(user) not in _SIZES:
                return f"{_name(user)} reads the features in their order"
    return None if region.readers else "no factored layer reads the features"


def _is_its_x(node: fx.Node, call: fx.Node) -> bool:
    """Whether the call reads the node as its first argument and nowhere else."""
    others = [a for a in (*call.args[1:], *call.kwargs.values()) if a is node]
    return argument(call, 0, "x") is node and not others


def _features(node: fx.Node) -> int | None:
    """The size of the last dimension; 1 for a scalar or sizes, None where it is unknown or symbolic."""
    value = _torch.fake_value(node)
    if not isinstance(value, Tensor):
        return 1 if isinstance(value, int | float | torch.SymInt | torch.Size) else None
    size = value.shape[-1] if value.dim() else 1
    return size if type(size) is int else None


def _by_feature(node: fx.Node) -> bool:
    """Whether feature i of the node's value depends on feature i of its inputs alone, whatever i is."""
    if not node.op.startswith("call_"):
        return False
    name = _name(node)
    if name == "dropout":
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return training is False
    return name in BY_FEATURE


def _name(node: fx.Node) -> str:
    named = node.op.startswith("call_") and not isinstance(node.target, str)
    return str(getattr(node.target, "__name__", node.target)) if named else str(node.target)


_ARITHMETIC = {"add", "sub", "mul", "truediv", "div", "pow", "neg", "square", "sqrt", "rsqrt", "abs", "exp", "erf"}
_ARITHMETIC |= {"iadd", "isub", "imul", "itruediv"}
_ACTIVATIONS = {"relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu", "mish"}
_ACTIVATIONS |= {"hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "clamp"}
_ACTIVATIONS |= {f"{name}_" for name in _ARITHMETIC | _ACTIVATIONS}
_COPIES = {"to", "float", "half", "bfloat16", "contiguous", "clone", "detach"}
_VIEWS = {"view", "reshape"}  # row-major, so that with the same last dimension every feature stays in its place
BY_FEATURE = frozenset(_ARITHMETIC | _ACTIVATIONS | _COPIES | _VIEWS)
_SIZES = frozenset({"size", "dim"})


# --- the fold itself -------------------------------------------------------------------------------------------------


def _common_order(region: Region) -> Tensor:
    """The features (m) in an order in which the first two writers with pivots write slices of y_p and y_np."""
    found = [(w.stop - w.start, pivots) for w in region.writers.values() if (pivots := w.pivots) is not None]
    m = found[0][0]
    in_first, in_second = (torch.zeros(m, dtype=torch.bool) for _ in range(2))
    in_first[found[0][1].cpu()] = True
    if len(found) > 1:
        in_second[found[1][1].cpu()] = True
    kinds = in_first & ~in_second, in_first & in_second, in_second & ~in_first, ~(in_first | in_second)
    return torch.cat([kind.nonzero().flatten() for kind in kinds]).to(found[0][1].device)


def _fold(region: Region, order: Tensor, buffers: Buffers, context: Context) -> None:
    """Have every writer write feature order[i] at place i, and every reader expect it there."""
    for writer in region.writers.values():
        _write_in(order, writer, buffers, context)
    for sites in {w.sites[0].node: w.sites for w in region.writers.values()}.values():
        _sort_rows(sites, buffers)
    for call, site in region.readers.items():
        _read_in(order, call, site, buffers)


def _write_in(order: Tensor, writer: Writer, buffers: Buffers, context: Context) -> None:
    site, start, stop = writer.sites[0], writer.start, writer.stop
    node, factors = site.node, site.factors
    bias = _reordered_bias(order, writer, buffers, context)
    if isinstance(factors, PifaFactors):
        given = factors.row_order
        place = derived(f"places {start} {stop}", [given, order], lambda: _places(given, order, start, stop))
        for sharing in writer.sites:
            sharing.factors = replace(factors, row_order=place)
        with in_place_of(node):
            rows = buffers.get(place, "row_order")
        node.args = (*node.args[:3], rows, bias, *node.args[5:])
    else:
        assert isinstance(factors, PairFactors)
        left = factors.left
        rows_in_order = derived("rows", [left, order], lambda: left[order], [lambda t: t[torch.argsort(order)]])
        site.factors = replace(factors, left=rows_in_order)
        with in_place_of(node):
            rows = buffers.get(site.factors.left, "left")
        node.args = (node.args[0], rows, bias)


def _sort_rows(sites: Sequence[LinearSite], buffers: Buffers) -> None:
    """Put the pivots in the order in which they are written, and the other rows as well."""
    node, factors = sites[0].node, sites[0].factors
    if not isinstance(factors, PifaFactors):
        return
    place, r = factors.row_order, factors.rank
    pivots, others = torch.argsort(place[:r]), torch.argsort(place[r:])
    if all(bool((order[1:] > order[:-1]).all()) for order in (pivots, others)):
        return

    def moved(name: str, given: Tensor, make: Callable[[], Tensor], *back: Callable[[Tensor], Tensor]) -> Tensor:
        return derived(name, [given, place], make, back)

    def others_back(t: Tensor) -> Tensor:
        return t[torch.argsort(others)][:, torch.argsort(pivots)].contiguous()

    def others_in_order() -> Tensor:  # by index_select: a third of the time of indexing
        return old[1].index_select(1, pivots).index_select(0, others)

    old = factors.pivot_rows, factors.coefficients
    factors = replace(
        factors,
        pivot_rows=moved("pivots in order", old[0], lambda: old[0][pivots], lambda t: t[torch.argsort(pivots)]),
        coefficients=moved("others in order", old[1], others_in_order, others_back),
        row_order=moved("rows in order", place, lambda: torch.cat([place[:r][pivots], place[r:][others]])),
    )
    for site in sites:
        site.factors = factors
    with in_place_of(node):
        given = [buffers.get(tensor, name) for name, tensor in factors.tensors().items() if name != "bias"]
    node.args = (node.args[0], *given, *node.args[4:])


def _places(given: Tensor, order: Tensor, start: int, stop: int) -> Tensor:
    """The row order ``given``, with what was row ``start + order[i]`` now at ``start + i``."""
    inside = (given >= start) & (given < stop)
    place = torch.argsort(order)
    moved = start + place[(given - start).clamp(0, stop - start - 1).to(torch.int64)]
    return torch.where(inside, moved, given.to(torch.int64)).to(torch.int32)


def _read_in(order: Tensor, call: fx.Node, site: LinearSite, buffers: Buffers) -> None:
    factors = site.factors
    assert factors is not None
    name = "pivot_rows" if isinstance(factors, PifaFactors) else "right"
    matrix = factors.tensors()[name]
    back = [lambda t: t[:, torch.argsort(order)].contiguous()]
    columns = derived("columns", [matrix, order], lambda: matrix[:, order].contiguous(), back)
    site.factors = replace(factors, **{name: columns})  # type: ignore[arg-type]
    with in_place_of(call):
        given = buffers.get(columns, name)
    call.args = (call.args[0], given, *call.args[2:])


def _reordered_bias(order: Tensor, writer: Writer, buffers: Buffers, context: Context) -> fx.Node | None:
    """The operator's bias with that of the layer in the order: a buffer, or computed where it is no constant."""
    site = writer.sites[0]
    node, factors = site.node, site.factors
    assert factors is not None
    old = argument(node, 4 if isinstance(factors, PifaFactors) else 2, "bias")
    if old is None:
        return None
    value = factors.bias if factors.bias is not None else context.values.get(site.bias)  # type: ignore[arg-type]
    constant = isinstance(value, Tensor) and not (torch.is_grad_enabled() and value.requires_grad)
    index = torch.arange(factors.shape[0], device=order.device)
    index[writer.start : writer.stop] = writer.start + order
    with in_place_of(node) as graph:
        if not constant:
            return graph.call_function(torch.index_select, (old, 0, buffers.get(index, "order")))
        with torch.inference_mode(False), torch.no_grad():
            new = buffers.get(value.detach()[index].to(factors.dtype), "bias")  # type: ignore[union-attr]
    if factors.bias is None:
        site.bias_taken = True
        node.replace_input_with(old, new)
        if old.op == "call_method" and not old.users:  # a cast of the bias
            node.graph.erase_node(old)
    return new
