"""On CPU, spell ``pifa::linear`` out in the graph, where Inductor packs weights and fuses the gather.

    before   y = pifa::linear(x, pivot_rows, coefficients, row_order, bias)
    after    y_p = linear(x, pivot_rows); y_np = linear(y_p, coefficients)
             y = cat([y_p, y_np], -1)[..., gather_order] + bias

A lowering would come too late: weight prepacking is done by graph passes. The bias is added after the gather, in the
same loop; added inside the linears it would pass through the coefficients. Factors whose order was folded away need no
gather, and pivots in aligned groups are gathered in whole groups.

One gather of N = 512 tokens to m = 2048 features, bfloat16, two cores with AVX-512: 0.57 ms by ``index_select``, 0.47
without its bounds check, 0.17 in groups of 16, where the two products take 7.6 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import PifaFactors
from pifa_compile.kernels import op
from pifa_compile.passes.plan import Context, PassResult, argument, cast, in_place_of, take_place
from pifa_compile.passes.replace import Buffers, output_dtype

#: Sizes of aligned groups of output rows, largest first, that are gathered as one.
GROUPS = (32, 16, 8)


def decompose(gm: fx.GraphModule, context: Context) -> PassResult:
    """Spell out every replaced site whose factors are on the CPU; other devices keep the operator for its lowering."""
    buffers = Buffers(gm)
    replaced = [s for s in context.plan.sites if isinstance(s.factors, PifaFactors) and s.node.target is op.linear]
    chosen = [s for s in replaced if s.factors is not None and s.factors.device.type == "cpu"]
    spelled: dict[fx.Node, fx.Node] = {}  # layers that share factors share the node that applies them
    for site in chosen:
        assert isinstance(site.factors, PifaFactors)
        if site.node not in spelled:
            spelled[site.node] = _spell_out(site.node, site.factors, buffers)
        site.node = spelled[site.node]
    return PassResult(len(replaced), len(chosen))


def _spell_out(old: fx.Node, factors: PifaFactors, buffers: Buffers) -> fx.Node:
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
        y = assemble(graph, y_p, y_np, factors, bias, rank_of(old), buffers)
    take_place(y, old)
    return y


_TENSORS = ((0, "x"), (1, "pivot_rows"), (2, "coefficients"), (4, "bias"))


def _mixed(
    graph: fx.Graph, given: tuple[fx.Node, fx.Node, fx.Node], factors: PifaFactors, dtype: torch.dtype
) -> tuple[fx.Node, fx.Node]:
    """y_p and y_np where y_p is kept in float32 and rounded to the coefficients' own dtype, as the operator does."""
    linear = _torch.linear_function()
    x, pivot_rows, coefficients = (graph.call_method("float", (node,)) for node in given)
    accumulated = graph.call_function(linear, (x, pivot_rows))
    scaled = graph.call_function(torch.mul, (accumulated, factors.y_scale))
    rounded = graph.call_method("float", (graph.call_method("to", (scaled, factors.coefficients.dtype)),))
    y_np = graph.call_function(torch.div, (graph.call_function(linear, (rounded, coefficients)), factors.y_scale))
    return graph.call_method("to", (accumulated, dtype)), graph.call_method("to", (y_np, dtype))


def assemble(
    graph: fx.Graph,
    y_p: fx.Node,
    y_np: fx.Node,
    factors: PifaFactors,
    bias: fx.Node | None,
    dimensions: int | None,
    buffers: Buffers,
) -> fx.Node:
    """The layer's output: [y_p, y_np] in the order of the output rows, plus the bias.

    dimensions  of the output, None where it is not known
    """
    y = y_p
    if factors.coefficients.shape[0]:
        y = graph.call_function(torch.cat, ([y_p, y_np], -1))
    if not in_order(factors):
        group = group_size(factors.gather_order)
        if group > 1:
            groups = buffers.get((factors.gather_order[::group] // group).contiguous(), "group_order")
            y = graph.call_method("unflatten", (y, -1, (-1, group)))
            y = graph.call_function(torch.index_select, (y, -2, groups))
            y = graph.call_method("flatten", (y, -2))
        elif dimensions is not None:
            index = [None] * (dimensions - 1) + [buffers.get(factors.gather_order, "gather_order")]
            y = graph.call_function(_torch.unchecked_index(), (y, index))
        else:
            y = graph.call_function(torch.index_select, (y, -1, buffers.get(factors.gather_order, "gather_order")))
    return y if bias is None else graph.call_function(torch.add, (y, bias))


def in_order(factors: PifaFactors) -> bool:
    """Whether the output rows already stand in their order, so that nothing need be gathered."""
    return bool((factors.gather_order[1:] > factors.gather_order[:-1]).all())


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


def rank_of(node: fx.Node) -> int | None:
    """The number of dimensions of the node's value, None where it is not known."""
    value = _torch.fake_value(node)
    return value.dim() if isinstance(value, Tensor) else None
