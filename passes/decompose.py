"""On CPU, spell ``pifa::linear`` out in the graph, where Inductor packs weights and fuses the gather.

    before   y = pifa::linear(x, pivot_rows, coefficients, row_order, bias)
    after    y_p = linear(x, pivot_rows); y_np = linear(y_p, coefficients)
             y = cat([y_p, y_np], -1).index_select(-1, gather_order) + bias

A lowering would come too late: weight prepacking is done by graph passes. The bias is added after the gather, in the
same loop; added inside the linears it would pass through the coefficients.
"""

from __future__ import annotations

import torch
from torch import fx

from pifa_compile import _torch
from pifa_compile.factors import PifaFactors
from pifa_compile.passes.plan import Context, PassResult, argument, cast, in_place_of, take_place
from pifa_compile.passes.replace import Buffers, output_dtype


def decompose(gm: fx.GraphModule, context: Context) -> PassResult:
    """Spell out every replaced site whose factors are on the CPU; other devices keep the operator for its lowering."""
    buffers = Buffers(gm)
    replaced = [s for s in context.plan.sites if isinstance(s.factors, PifaFactors)]
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
        y = y_p
        if factors.coefficients.shape[0]:
            y = graph.call_function(torch.cat, ([y_p, y_np], -1))
        if not in_order(factors):
            y = graph.call_function(torch.index_select, (y, -1, buffers.get(factors.gather_order, "gather_order")))
        if bias is not None:
            y = graph.call_function(torch.add, (y, bias))
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


def in_order(factors: PifaFactors) -> bool:
    """Whether the output rows already stand in their order, so that nothing need be gathered."""
    return bool((factors.gather_order[1:] > factors.gather_order[:-1]).all())
