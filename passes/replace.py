"""Put the factors in the place of the dense weights: every linear layer with factors becomes ``pifa::linear``.

    before   y = linear(x, weight, bias)                          (or any other form that ``forms`` knows)
    after    y = pifa::linear(x, pivot_rows, coefficients, row_order, bias, y_scale)
                                                                  (x of the first half, where it is a pair)
    or       y = linear(linear(x, right), left, bias)                       (a layer kept as a plain pair)

The factors become buffers of the graph module, which keeps both compile caches working, makes them static for CUDA
graphs and keeps their values out of Inductor's cache files. The dtype of the original node is the contract: under
autocast x and the factors are cast to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import Factors, PairFactors
from pifa_compile.kernels.op import linear as pifa_linear
from pifa_compile.passes.plan import Context, LinearSite, PassResult, cast, in_place_of, take_place


def replace(gm: fx.GraphModule, context: Context) -> PassResult:
    """Replace every open site that has a record; its node becomes the node of the replacement."""
    buffers = Buffers(gm)
    moved: dict[fx.Node, fx.Node] = {}  # a layer may read another that was replaced before it
    changed = 0
    for site in context.plan.sites:
        if site.open and site.parameter is not None and (site.record is not None or site.factors is not None):
            dtype = output_dtype(site.node, site.parameter)
            if site.factors is None and site.record is not None:
                site.factors = context.load(site.record, site.parameter.detach().new_empty(0, dtype=dtype))
            assert site.factors is not None
            old, x = site.node, site.x if site.inner is None else site.inner.x
            moved[old] = _replace_site(site, moved.get(x, x), site.factors, dtype, buffers)
            changed += 1
    return PassResult(len(context.plan.sites), changed, context.plan.skipped())


def output_dtype(node: fx.Node, weight: Tensor) -> torch.dtype:
    """The dtype that the original layer's output has; under autocast it is not the weight's."""
    value = _torch.fake_value(node)
    return value.dtype if isinstance(value, Tensor) else weight.dtype


class Buffers:
    """Adds tensors to a graph module as buffers, each tensor once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._names: dict[int, str] = {}

    def get(self, tensor: Tensor, label: str) -> fx.Node:
        """A get_attr node of the tensor, at the graph's current insertion point."""
        if id(tensor) not in self._names:
            name = f"pifa_{label}_{sum(1 for n, _ in self._gm.named_buffers() if n.startswith('pifa_'))}"
            self._gm.register_buffer(name, tensor)
            _torch.name_lifted_buffer(self._gm, name)
            self._names[id(tensor)] = name
        node = self._gm.graph.get_attr(self._names[id(tensor)])
        node.meta["example_value"] = tensor
        return node


def _replace_site(site: LinearSite, given: fx.Node, factors: Factors, dtype: torch.dtype, buffers: Buffers) -> fx.Node:
    """Write the replacement of a site that reads ``given``; returns the node with the layer's output."""
    old = site.node
    with in_place_of(old) as graph:
        x = cast(graph, given, dtype)
        if site.channel != -1:
            x = graph.call_method("movedim", (x, site.channel, -1))
        bias = None if site.bias is None else cast(graph, site.bias, dtype)
        if factors.bias is not None:
            bias = buffers.get(factors.bias, "bias")
        parts = [buffers.get(t, name) for name, t in factors.tensors().items() if name != "bias"]
        if isinstance(factors, PairFactors):
            left, right = parts
            inner = graph.call_function(_torch.linear_function(), (x, right))
            new = graph.call_function(_torch.linear_function(), (inner, left, bias))
        else:
            new = graph.call_function(pifa_linear, (x, *parts, bias, factors.y_scale))
    site.node = new
    if site.channel != -1:
        with in_place_of(old) as graph:
            new = graph.call_method("movedim", (new, -1, site.channel))
            if _is_contiguous(old):  # as a convolution leaves it, for readers that view it
                new = graph.call_method("contiguous", (new,))
    take_place(new, old)
    return new


def _is_contiguous(node: fx.Node) -> bool:
    value = _torch.fake_value(node)
    return isinstance(value, Tensor) and value.is_contiguous()
