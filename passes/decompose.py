"""On CPU, spell ``pifa::linear`` out in the graph, or have a kernel of ours do all of it.

What is written here are calls of functions: AOTAutograd keeps no graph with a method of a node of unknown value.

    before   y = pifa::linear(x, pivot_rows, coefficients, row_order, bias)
    after    y_p = linear(x, pivot_rows); y_np = linear(y_p, coefficients)
             y = pifa::merge(y_p, y_np, blocks) + bias
      or     y = cat([y_p, y_np], -1)[..., gather_order] + bias
      or     y = pifa::few_tokens(x, pivot_rows, coefficients, row_order, bias)

A lowering would come too late: weight prepacking is done by graph passes. The bias is added after the gather, in the
same loop; added inside the linears it would pass through the coefficients. Factors whose order was folded away need no
gather, and pivots in aligned groups are gathered in whole groups.

One call with all of a layer is faster for few tokens, of which the processor says how many; see
``kernels/cpu/few_tokens.cpp``. The merge is not fused with what reads it, so it is for many features.

N = 512 tokens to m = 2048 features, bfloat16: two cores of an EPYC with AVX-512 0.57 ms by ``index_select``, 0.47
without its bounds check, 0.17 in groups of 16, where the two products take 7.6 ms; of a Xeon with AMX 0.74 gathered,
0.21 merged and 0.16 copied side by side, where the two products take 5.2 ms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import PifaFactors
from pifa_compile.kernels import few_tokens, merge, op
from pifa_compile.passes.plan import Context, LinearSite, PassResult, argument, cast, in_place_of, take_place
from pifa_compile.passes.replace import Buffers, output_dtype

#: Rows in so few runs of neighbours are copied as slices, where they are not merged. Two: y_p and y_np as they are.
#: Three: an order that two layers have in common, see ``fold.py``.
FEW_RUNS = 4

#: Features of all tokens together from which the kernel that merges is called, which takes 10 us more than a loop of
#: Inductor's. It pays later, but such a loop of slices is another one for every layer: a gated Llama of 6 layers and
#: 16 layers of width 1024 compiled in 1.21 and 1.25 of dense with loops, and in 1.17 and 1.11 with the kernel (both
#: before Inductor's look at the processor was begun beside the passes).
MERGED = 1 << 15

#: Sizes of aligned groups of output rows, largest first, that are gathered as one.
GROUPS = (32, 16, 8)


def decompose(gm: fx.GraphModule, context: Context) -> PassResult:
    """Spell out every replaced site whose factors are on the CPU; other devices keep the operator for its lowering."""
    buffers = CpuBuffers(gm, context)
    families: dict[fx.Node, list[LinearSite]] = {}  # layers that share factors share the node that applies them
    for site in context.plan.sites:
        if isinstance(site.factors, PifaFactors) and site.node.target is op.linear:
            families.setdefault(site.node, []).append(site)
    chosen = [sites for sites in families.values() if (f := sites[0].factors) is not None and f.device.type == "cpu"]
    for sites in chosen:
        if has_few_tokens(sites[0], buffers):
            _in_one_call(sites)
        else:
            _spell_out(sites, buffers)
    return PassResult(len(families), len(chosen))


class CpuBuffers(Buffers):
    """Buffers of a graph on CPU, which knows whether it may call kernels of ours, and whether weights will be packed.

    The kernels have no gradients and no rules for torch.func, and ``inner="eager"`` is to run without a compiler.
    """

    def __init__(self, gm: fx.GraphModule, context: Context) -> None:
        super().__init__(gm)
        plain = not torch.is_grad_enabled() and not _torch.transforms_functions(gm.graph)
        self.kernels = plain and context.settings.inner != "eager"
        self.packed = bool(context.settings.inductor.get("freezing"))


def has_few_tokens(site: LinearSite, buffers: CpuBuffers) -> bool:
    """Whether the layer of a site has so few tokens that one call with all of it is faster."""
    factors, tokens = site.factors, tokens_of(site.node.all_input_nodes[0])
    if not buffers.kernels or not isinstance(factors, PifaFactors) or tokens is None:
        return False
    plain = factors.coefficients.dtype == factors.dtype == output_dtype(site.node, factors.pivot_rows)
    return plain and few_tokens.serves(tokens, *factors.shape, factors.rank, factors.dtype, packed=buffers.packed)


def tokens_of(x: fx.Node) -> int | None:
    """The number of tokens in the value of a node, None where it is unknown or symbolic."""
    value = _torch.fake_value(x)
    if not isinstance(value, Tensor) or not all(type(size) is int for size in value.shape):
        return None
    return math.prod(value.shape[:-1])


def _in_one_call(sites: Sequence[LinearSite]) -> None:
    old = sites[0].node
    with in_place_of(old) as graph:
        y = graph.call_function(few_tokens.few_tokens, old.args[:5])
    for site in sites:
        site.node = y
    take_place(y, old)


def _spell_out(sites: Sequence[LinearSite], buffers: CpuBuffers) -> None:
    old, factors = sites[0].node, sites[0].factors
    assert isinstance(factors, PifaFactors)
    x, pivot_rows, coefficients, bias = (argument(old, i, name) for i, name in _TENSORS)
    assert x is not None and pivot_rows is not None and coefficients is not None
    linear = _torch.linear_function()
    dtype = output_dtype(old, factors.pivot_rows)
    with in_place_of(old) as graph:
        if dtype != factors.dtype:  # a prepared layer under autocast
            x, pivot_rows = cast(graph, x, dtype), cast(graph, pivot_rows, dtype)
            bias = None if bias is None else cast(graph, bias, dtype)
            if factors.coefficients.dtype == factors.dtype:
                coefficients = cast(graph, coefficients, dtype)
        if factors.coefficients.dtype == factors.pivot_rows.dtype:
            y_p = graph.call_function(linear, (x, pivot_rows))
            y_np = graph.call_function(linear, (y_p, coefficients))
        else:
            y_p, y_np = _mixed(graph, (x, pivot_rows, coefficients), factors, dtype)
    write_output(sites, y_p, y_np, bias, buffers)


_TENSORS = ((0, "x"), (1, "pivot_rows"), (2, "coefficients"), (4, "bias"))


def _mixed(
    graph: fx.Graph, given: tuple[fx.Node, fx.Node, fx.Node], factors: PifaFactors, dtype: torch.dtype
) -> tuple[fx.Node, fx.Node]:
    """y_p and y_np where y_p is kept in float32 and rounded to the coefficients' own dtype, as the operator does."""
    def as_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return graph.call_function(torch.ops.aten.to.dtype, (node, dtype))

    linear = _torch.linear_function()
    x, pivot_rows, coefficients = (as_dtype(node, torch.float32) for node in given)
    accumulated = graph.call_function(linear, (x, pivot_rows))
    scaled = graph.call_function(torch.mul, (accumulated, factors.y_scale))
    rounded = as_dtype(as_dtype(scaled, factors.coefficients.dtype), torch.float32)
    y_np = graph.call_function(torch.div, (graph.call_function(linear, (rounded, coefficients)), factors.y_scale))
    return as_dtype(accumulated, dtype), as_dtype(y_np, dtype)


# --- the output in its order -----------------------------------------------------------------------------------------


def write_output(
    sites: Sequence[LinearSite], y_p: fx.Node, y_np: fx.Node, bias: fx.Node | None, buffers: CpuBuffers
) -> None:
    """Let [y_p, y_np] in the order of the output rows, plus the bias, take the place of the sites' node.

    Layers with shared factors have one node, and read their rows out of it by ``narrow``. Each then is put together by
    itself, of slices: the pivots of one layer stand side by side, and so do its other rows.
    """
    old, factors = sites[0].node, sites[0].factors
    assert isinstance(factors, PifaFactors)
    for site in sites:
        site.order_taken = True
    whole = _Rows(y_p, y_np, factors.gather_order, factors.rank, _pays_to_merge(old, factors, buffers))
    dimensions = dimensions_of(old) or dimensions_of(old.all_input_nodes[0])
    parts = {user: part for user in old.users if (part := _part_read_by(user, whole)) is not None}
    if bias is None and len(parts) == len(old.users):
        for user, part in parts.items():
            with in_place_of(user) as graph:
                y = _in_order(graph, part.sliced(graph), None, dimensions, buffers)
            for site in sites:
                if site.rows == (user.args[2], user.args[2] + user.args[3]):  # type: ignore[operator]
                    site.node = y
            take_place(y, user)
        old.graph.erase_node(old)
    else:
        with in_place_of(old) as graph:
            y = _in_order(graph, whole, bias, dimensions, buffers)
        for site in sites:
            site.node = y
        take_place(y, old)


@dataclass(frozen=True)
class _Rows:
    """Output rows of a layer: row j is at place positions[j] of [y_p, y_np], where y_p has the first r places.

    merge  whether the kernel that merges both may be called
    taken  where the rows begin and end in y_p and in y_np; None where they fill them
    """

    y_p: fx.Node
    y_np: fx.Node
    positions: Tensor
    r: int
    merge: bool
    taken: tuple[tuple[int, int], tuple[int, int]] | None = None

    def sliced(self, graph: fx.Graph) -> _Rows:
        """The same, of rows that do not fill y_p and y_np, with slices of these that they fill."""
        assert self.taken is not None
        y_p, y_np = (last_features(graph, y, *ends) for y, ends in zip((self.y_p, self.y_np), self.taken, strict=True))
        return _Rows(y_p, y_np, self.positions, self.r, self.merge)


def _part_read_by(user: fx.Node, whole: _Rows) -> _Rows | None:
    """The rows that a ``narrow`` takes, if they stand side by side in y_p and in y_np."""
    if user.op != "call_method" or user.target != "narrow" or user.kwargs or user.args[1] != -1:
        return None
    start, length = user.args[2:]
    if not (isinstance(start, int) and isinstance(length, int)):
        return None
    positions = whole.positions[start : start + length]
    in_p, in_np = positions[positions < whole.r], positions[positions >= whole.r]
    if not len(in_p) or not len(in_np):
        return None
    first, other = int(in_p.min()), int(in_np.min())
    if int(in_p.max()) - first + 1 != len(in_p) or int(in_np.max()) - other + 1 != len(in_np):
        return None
    local = torch.where(positions < whole.r, positions - first, positions - other + len(in_p))
    ends = (first, first + len(in_p)), (other - whole.r, other - whole.r + len(in_np))
    return _Rows(whole.y_p, whole.y_np, local, len(in_p), whole.merge, ends)


def last_features(graph: fx.Graph, y: fx.Node, start: int, stop: int) -> fx.Node:
    """Features ``start`` to ``stop`` of y, a view."""
    part: Any = (Ellipsis, slice(start, stop))
    return graph.call_function(operator.getitem, (y, part))


def _in_order(graph: fx.Graph, rows: _Rows, bias: fx.Node | None, dimensions: int | None, buffers: Buffers) -> fx.Node:
    """[y_p, y_np] with its features in the order of the rows, plus the bias; ``dimensions`` of it, None if unknown."""
    y, positions = rows.y_p, rows.positions
    runs, group = runs_of(positions, rows.r), group_size(positions)
    blocks = merge.blocks_of(positions, rows.r) if rows.merge and group == 1 else None
    if blocks is not None and len(runs) > 1:
        y = graph.call_function(merge.merge, (rows.y_p, rows.y_np, buffers.get(blocks, "blocks")))
    elif len(runs) <= FEW_RUNS:
        y = _side_by_side(graph, [_slice(graph, rows, *run) for run in runs])
    else:
        y = _side_by_side(graph, [rows.y_p] if positions.shape[0] == rows.r else [rows.y_p, rows.y_np])
        if group > 1:
            groups = buffers.get((positions[::group] // group).contiguous(), "group_order")
            y = graph.call_function(torch.unflatten, (y, -1, (-1, group)))
            y = graph.call_function(torch.index_select, (y, -2, groups))
            y = graph.call_function(torch.flatten, (y, -2))
        elif dimensions is not None:
            index = [None] * (dimensions - 1) + [buffers.get(positions, "gather_order")]
            y = graph.call_function(_torch.unchecked_index(), (y, index))
        else:
            y = graph.call_function(torch.index_select, (y, -1, buffers.get(positions, "gather_order")))
    return y if bias is None else graph.call_function(torch.add, (y, bias))


def _pays_to_merge(old: fx.Node, factors: PifaFactors, buffers: CpuBuffers) -> bool:
    """Whether the kernel that merges both parts can be had and has enough to do."""
    tokens, m = tokens_of(old.all_input_nodes[0]), factors.shape[0]
    enough = tokens is None or tokens * m >= MERGED
    return buffers.kernels and enough and factors.rank < m and merge.available(output_dtype(old, factors.pivot_rows))


def _side_by_side(graph: fx.Graph, parts: Sequence[fx.Node]) -> fx.Node:
    return parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (list(parts), -1))


def _slice(graph: fx.Graph, rows: _Rows, start: int, stop: int) -> fx.Node:
    """Places ``start`` to ``stop`` of [y_p, y_np], all of which are in one of the two."""
    r, m = rows.r, rows.positions.shape[0]
    y, start, stop, whole = (rows.y_p, start, stop, r) if start < r else (rows.y_np, start - r, stop - r, m - r)
    return y if (start, stop) == (0, whole) else last_features(graph, y, start, stop)


def runs_of(positions: Tensor, r: int) -> list[tuple[int, int]]:
    """The positions (m, a permutation) as runs (start, stop) of neighbours, none of which goes on from y_p to y_np."""
    new = positions != torch.cat([positions[:1] - 2, positions[:-1]]) + 1
    begins = (new | (positions == r)).nonzero().flatten()
    lengths = torch.diff(begins, append=begins.new_tensor([positions.shape[0]])).tolist()
    return [(start, start + length) for start, length in zip(positions[begins].tolist(), lengths, strict=True)]


def group_size(positions: Tensor) -> int:
    """The largest of GROUPS such that the positions (m, a permutation) move aligned groups of that size; else 1."""
    m = positions.shape[0]
    for group in GROUPS:
        if m % group == 0:
            groups = positions.view(-1, group)
            first = groups[:, :1]
            if bool((first % group == 0).all() and (groups - first == torch.arange(group, device=first.device)).all()):
                return group
    return 1


def dimensions_of(node: fx.Node) -> int | None:
    """The number of dimensions of the node's value, None where it is not known."""
    value = _torch.fake_value(node)
    return value.dim() if isinstance(value, Tensor) else None
