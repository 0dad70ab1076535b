"""Put the factors in the place of the dense weights: every linear layer with factors becomes ``pifa::linear``.

    before   y = linear(x, weight, bias)                          (or any other form that ``forms`` knows)
    after    y = pifa::linear(x, pivot_rows, coefficients, row_order, bias, y_scale)
                                                                  (x of the first half, where it is a pair)
    or       y = linear(linear(x, right), left, bias)                       (a layer kept as a plain pair)

Layers that share one factorization and read the same x become one operator on their stacked rows, split after it:

    before   q = linear(x, weight_q); k = linear(x, weight_k, bias_k)
    after    y = pifa::linear(x, pivot_rows, coefficients, row_order)
             q = y.narrow(-1, 0, m_q); k = y.narrow(-1, m_q, m_k) + bias_k

One of them alone runs on the same pivot rows and its own part of the coefficients.

The factors become buffers of the graph module, which keeps both compile caches working, makes them static for CUDA
graphs and keeps their values out of Inductor's cache files. The dtype of the original node is the contract: under
autocast x and the factors are cast to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import Factors, PairFactors
from pifa_compile.kernels.op import linear as pifa_linear
from pifa_compile.loaded import derived
from pifa_compile.passes.plan import Context, LinearSite, PassResult, cast, in_place_of, take_place


def replace(gm: fx.GraphModule, context: Context) -> PassResult:
    """Replace every open site that has a record; its node becomes the node that applies its factors."""
    buffers = Buffers(gm)
    moved: dict[fx.Node, fx.Node] = {}  # a layer may read another that was replaced before it
    stacked: dict[Any, fx.Node] = {}  # the output of factors that several layers share
    changed = 0
    together = _together(context.plan.sites)
    for site in context.plan.sites:
        if site.open and site.parameter is not None and (site.record is not None or site.factors is not None):
            dtype = output_dtype(site.node, site.parameter)
            old, x = site.node, site.x if site.inner is None else site.inner.x
            key = together.get(id(site))
            if site.factors is None and site.record is not None:
                site.factors = context.load(site.record, site.parameter.detach().new_empty(0, dtype=dtype))
                if site.rows is not None and key is None:
                    site.factors, site.rows = _part(site.factors, *site.rows), None
            assert site.factors is not None
            with in_place_of(old) as graph:
                if key is None or key not in stacked:
                    stacked[key] = _apply_factors(site, moved.get(x, x), site.factors, dtype, buffers, graph)
                site.node = stacked[key]
                moved[old] = new = _output(site, old, graph, dtype)
            take_place(new, old)
            changed += 1
    return PassResult(len(context.plan.sites), changed, context.plan.skipped())


def _part(factors: Factors, start: int, stop: int) -> Factors:
    """``factors.part(start, stop)``, without a copy of the coefficients.

    So the whole of them is kept for as long as a graph runs one of the layers, and another graph that runs another, or
    a recompilation, finds them: read again and copied again they took 50 ms for q and k of width 2048 at density 0.5.
    """
    if isinstance(factors, PairFactors):
        return factors.part(start, stop)
    return factors.part(start, stop, _rows_of)


def _rows_of(coefficients: Tensor, places: Tensor) -> Tensor:
    first = int(places[0]) if len(places) else 0
    if len(places) == 0 or int(places[-1]) - first + 1 != len(places):  # one layer's rows are scattered among others
        return derived("rows at", [coefficients, places], lambda: coefficients[places])
    return derived("rows from", [coefficients, places], lambda: coefficients.narrow(0, first, len(places)))


def _together(sites: Sequence[LinearSite]) -> dict[int, Any]:
    """By the id of the site: a key of the sites of one graph that read the same x, share factors and are all there."""
    found: dict[Any, list[LinearSite]] = {}
    for site in sites:
        if site.open and site.rows is not None and site.record is not None and site.parameter is not None:
            key = (site.record.object, site.x, output_dtype(site.node, site.parameter))
            found.setdefault(key, []).append(site)
    whole = {k: s for k, s in found.items() if sorted(m for site in s if (m := site.rows)) == _all_rows(s[0])}
    return {id(site): key for key, members in whole.items() for site in members}


def _all_rows(site: LinearSite) -> list[tuple[int, int]]:
    assert site.record is not None
    ends = list(accumulate(member.m for member in site.record.members))
    return list(zip([0, *ends], ends, strict=False))


def output_dtype(node: fx.Node, weight: Tensor) -> torch.dtype:
    """The dtype that the original layer's output has; under autocast it is not the weight's."""
    value = _torch.fake_value(node)
    return value.dtype if isinstance(value, Tensor) else weight.dtype


class Buffers:
    """Adds tensors to a graph module as buffers, each tensor once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        ours = ((n, t) for n, t in gm.named_buffers(remove_duplicate=False) if n.startswith("pifa_"))
        self._names = {id(t): name for name, t in ours}  # also those of passes before this one
        self._numbers = count(len(self._names))

    def get(self, tensor: Tensor, label: str) -> fx.Node:
        """A get_attr node of the tensor, at the graph's current insertion point."""
        if id(tensor) not in self._names:
            names = (f"pifa_{label}_{number}" for number in self._numbers)
            name = next(name for name in names if not hasattr(self._gm, name))
            self._gm.register_buffer(name, tensor)
            _torch.name_lifted_buffer(self._gm, name)
            self._names[id(tensor)] = name
        node = self._gm.graph.get_attr(self._names[id(tensor)])
        node.meta["example_value"] = tensor
        return node


def _apply_factors(
    site: LinearSite, given: fx.Node, factors: Factors, dtype: torch.dtype, buffers: Buffers, graph: fx.Graph
) -> fx.Node:
    """Write the node that applies the factors of a site to what it reads."""
    x = cast(graph, given, dtype)
    if site.channel != -1:
        x = graph.call_method("movedim", (x, site.channel, -1))
    bias = None
    if factors.bias is not None:
        bias = buffers.get(factors.bias, "bias")
    elif site.bias is not None and not _is_part(site):
        bias = cast(graph, site.bias, dtype)
    parts = [buffers.get(t, name) for name, t in factors.tensors().items() if name != "bias"]
    if isinstance(factors, PairFactors):
        left, right = parts
        inner = graph.call_function(_torch.linear_function(), (x, right))
        return graph.call_function(_torch.linear_function(), (inner, left, bias))
    return graph.call_function(pifa_linear, (x, *parts, bias, factors.y_scale))


def _output(site: LinearSite, old: fx.Node, graph: fx.Graph, dtype: torch.dtype) -> fx.Node:
    """Write what makes the output of a site of that of its factors: its rows, its bias, its channels."""
    y = site.node
    if _is_part(site):
        assert site.shape is not None and site.factors is not None
        start, stop = site.rows or (0, site.shape[0])
        y = graph.call_method("narrow", (y, -1, start, stop - start))
        if site.bias is not None and site.factors.bias is None:
            y = graph.call_function(torch.add, (y, cast(graph, site.bias, dtype)))
    if site.channel != -1:
        y = graph.call_method("movedim", (y, -1, site.channel))
        if _is_contiguous(old):  # as a convolution leaves it, for readers that view it
            y = graph.call_method("contiguous", (y,))
    return y


def _is_part(site: LinearSite) -> bool:
    """Whether the factors have more rows than the site's layer."""
    assert site.shape is not None and site.factors is not None
    return site.factors.shape[0] != site.shape[0]


def _is_contiguous(node: fx.Node) -> bool:
    value = _torch.fake_value(node)
    return isinstance(value, Tensor) and value.is_contiguous()
