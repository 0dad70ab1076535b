"""Put the factors in the place of the dense weights: every linear layer with factors becomes ``pifa::linear``.

    before   y = linear(x, weight, bias)
    after    y = pifa::linear(x, pivot_rows, coefficients, row_order, bias, y_scale)
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
from pifa_compile.passes.plan import Context, LinearSite, PassResult, argument, in_place_of, take_place


def replace(gm: fx.GraphModule, context: Context) -> PassResult:
    """Replace every open site that has a record; its node becomes the node of the replacement."""
    buffers = Buffers(gm)
    changed = 0
    for site in context.plan.sites:
        if site.open and site.record is not None and site.parameter is not None:
            dtype = output_dtype(site.node, site.parameter)
            site.factors = context.load(site.record, site.parameter.detach().new_empty(0, dtype=dtype))
            _replace_site(site, site.factors, dtype, buffers)
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


def _replace_site(site: LinearSite, factors: Factors, dtype: torch.dtype, buffers: Buffers) -> None:
    old = site.node
    with in_place_of(old) as graph:
        x = _cast(graph, argument(old, 0, "input"), dtype)
        bias = buffers.get(factors.bias, "bias") if factors.bias is not None else _cast(graph, site.bias, dtype)
        parts = [buffers.get(t, name) for name, t in factors.tensors().items() if name != "bias"]
        if isinstance(factors, PairFactors):
            left, right = parts
            inner = graph.call_function(_torch.linear_function(), (x, right))
            new = graph.call_function(_torch.linear_function(), (inner, left, bias))
        else:
            new = graph.call_function(pifa_linear, (x, *parts, bias, factors.y_scale))
    take_place(new, old)
    site.node = new


def _cast(graph: fx.Graph, node: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    """The node in ``dtype``; itself where it already has it."""
    if node is None:
        return None
    value = _torch.fake_value(node)
    if isinstance(value, Tensor) and value.dtype == dtype:
        return node
    cast = graph.call_method("to", (node, dtype))
    if isinstance(value, Tensor):
        cast.meta["example_value"] = value.to(dtype)
    return cast
