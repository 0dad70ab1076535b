"""Sibling layers, which read the same input (q, k and v; gate and up), together.

On CPU they get one first product:

    before   y_1 = pifa::linear(x, P_1, C_1, order_1); y_2 = pifa::linear(x, P_2, C_2, order_2)
    after    y_p = linear(x, cat([P_1, P_2]))
             y_1 = cat([y_p[..., :r_1], linear(y_p[..., :r_1], C_1)], -1)[..., gather_order_1]; y_2 likewise

Ranks may differ. The pivot rows are put together once and shared by all graphs of the process; they take the place of
the separate ones, which nobody holds any more, so memory stays as it was. That is not so for prepared layers, which own
their factors: these stay apart, unless they were factored together and own the same pivot rows. In the graph of a dense
model layers that were factored together come as one operator, which is one sibling. With few tokens each layer is one
call already, see ``decompose.py``.

It saves calls, so it pays where calls cost most. q, k, v of width 384 at rank 112, float32, two cores, of the time of
dense: 0.95 apart and 0.85 grouped for one token, 0.86 and 0.81 for 16, 0.71 and 0.70 for 64.

On CUDA, siblings that read a few tokens become one operator of two launches, see ``kernels/siblings.py``:

    after    y = pifa::siblings(x, [P_1, P_2], [C_1, C_2], [order_1, order_2])
             y_1 = y.narrow(-1, 0, m_1) + b_1; y_2 = y.narrow(-1, m_1, m_2) + b_2

It takes the factors as they are, so that prepared layers are grouped as well. In the graph of many tokens, or of any
number of them, each layer keeps its operator, into whose one launch more of what follows can be fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import PifaFactors
from pifa_compile.kernels import op, siblings
from pifa_compile.loaded import derived
from pifa_compile.passes.decompose import CpuBuffers, has_few_tokens, last_features, tokens_of, write_output
from pifa_compile.passes.plan import Context, LinearSite, PassResult, argument, device_of, in_place_of, take_place
from pifa_compile.passes.replace import output_dtype


def group(gm: fx.GraphModule, context: Context) -> PassResult:
    """Take all siblings of the graph together; layers without a sibling stay as they are."""
    buffers = CpuBuffers(gm, context)
    operators: dict[fx.Node, list[LinearSite]] = {}
    for site in context.plan.sites:
        factors = site.factors
        if isinstance(factors, PifaFactors) and _can_join(site, factors):
            operators.setdefault(site.node, []).append(site)
    kinds = {"cpu": (_families_on_cpu, _join), "cuda": (_families_on_cuda, _in_one_operator)}
    matched = changed = 0
    for kind, (find, join) in kinds.items():
        found = find([sites for sites in operators.values() if device_of(_factors(sites)).type == kind], buffers)
        siblings = [family for family in found if len(family) > 1 and not _written_between(family)]
        for family in siblings:
            join(family, buffers)
        matched += len(found)
        changed += len(siblings)
    return PassResult(matched, changed)


#: Layers that read the same input: of each operator all sites.
Family = list[Sequence[LinearSite]]


def _families_on_cpu(operators: Sequence[Sequence[LinearSite]], buffers: CpuBuffers) -> Sequence[Family]:
    families: dict[object, Family] = {}
    for sites in operators:
        if not has_few_tokens(sites[0], buffers):
            node = sites[0].node
            own = argument(node, 1, "pivot_rows") if sites[0].prepared else None
            families.setdefault((_source(node.all_input_nodes[0]), _factors(sites).dtype, own), []).append(sites)
    return list(families.values())


def _families_on_cuda(operators: Sequence[Sequence[LinearSite]], buffers: CpuBuffers) -> Sequence[Family]:
    """At most ``siblings.MOST`` layers each, of tensors that all are there before the first of them."""
    families: dict[object, list[Family]] = {}
    for sites in operators:
        node, factors = sites[0].node, _factors(sites)
        tokens, tensors = tokens_of(node.all_input_nodes[0]), _tensors(sites)
        few = buffers.kernels and tokens is not None and siblings.serves(device_of(factors), factors.dtype, tokens)
        given = all(tensor.op in ("placeholder", "get_attr") for tensor in tensors)
        if not (few and given and factors.rank < factors.shape[0]):
            continue
        found = families.setdefault((_source(node.all_input_nodes[0]), factors.dtype), [[]])
        taken = {tensor.target for other in found[-1] for tensor in _tensors(other)}
        if not taken.isdisjoint(tensor.target for tensor in tensors):  # a kernel takes a tensor once
            continue
        if len(found[-1]) == siblings.MOST:
            found.append([])
        found[-1].append(sites)
    return [family for found in families.values() for family in found]


def _tensors(sites: Sequence[LinearSite]) -> list[fx.Node]:
    """The pivot rows, coefficients and row order of an operator."""
    found = [argument(sites[0].node, i, name) for i, name in enumerate(("pivot_rows", "coefficients", "row_order"), 1)]
    return [node for node in found if node is not None]


def _factors(sites: Sequence[LinearSite]) -> PifaFactors:
    """The factors that the sites of one operator share."""
    factors = sites[0].factors
    assert isinstance(factors, PifaFactors)
    return factors


def _can_join(site: LinearSite, factors: PifaFactors) -> bool:
    plain = factors.coefficients.dtype == factors.dtype == output_dtype(site.node, factors.pivot_rows)
    return plain and site.node.target is op.linear and site.channel == -1


def _source(x: fx.Node) -> fx.Node:
    """What the layers read: under autocast each has its own cast of it."""
    return x.all_input_nodes[0] if x.op == "call_method" and x.target == "to" and len(x.all_input_nodes) == 1 else x


def _written_between(family: Sequence[Sequence[LinearSite]]) -> bool:
    """Whether anything is changed in place between the first sibling and the last: it might be what they read."""
    node, last = family[0][0].node, family[-1][0].node
    while node is not last:
        name = str(getattr(node.target, "__name__", node.target))
        inplace = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if node.op.startswith("call_") and (inplace or node.kwargs.get("inplace") or node.kwargs.get("out")):
            return True
        node = node.next
    return False


_IN_PLACE = frozenset({"setitem", "iadd", "isub", "imul", "itruediv"})


def _in_one_operator(family: Sequence[Sequence[LinearSite]], buffers: CpuBuffers) -> None:
    """Write one operator in place of the first sibling, and read each layer's output out of it where that stood."""
    first = family[0][0].node
    lists = list(zip(*(_tensors(sites) for sites in family), strict=True))
    for node in (tensor for tensors in lists for tensor in tensors):
        if node.op == "get_attr":
            first.prepend(node)
    with in_place_of(first) as graph:
        y = graph.call_function(siblings.siblings, (first.all_input_nodes[0], *map(list, lists)))
    start = 0
    for sites in family:
        old, m = sites[0].node, _factors(sites).shape[0]
        bias = argument(old, 4, "bias")
        with in_place_of(old) as graph:
            own = graph.call_function(torch.narrow, (y, -1, start, m))
            if bias is not None:
                own = graph.call_function(torch.add, (own, bias))
        for site in sites:
            site.node = own
        take_place(own, old)
        start += m


def _join(family: Sequence[Sequence[LinearSite]], buffers: CpuBuffers) -> None:
    """Write the first product in place of the first sibling: what they read is there when that is first needed."""
    linear = _torch.linear_function()
    first = family[0][0].node
    first_x = first.all_input_nodes[0]
    shared = argument(first, 1, "pivot_rows") if family[0][0].prepared else None
    parts = [_factors(sites).pivot_rows for sites in family]
    with in_place_of(first) as graph:
        rows = shared or buffers.get(derived("stacked", parts, lambda: torch.cat(parts), _unstack(parts)), "pivot_rows")
        y_p = graph.call_function(linear, (first_x, rows))
    start = 0
    for sites in family:
        old, factors = sites[0].node, _factors(sites)
        coefficients, bias = argument(old, 2, "coefficients"), argument(old, 4, "bias")
        assert coefficients is not None
        stop = start + factors.rank
        with in_place_of(old) as graph:
            own = y_p if shared is not None else last_features(graph, y_p, start, stop)
            y_np = _times(graph, own, coefficients, first_x)
        write_output(sites, own, y_np, bias, buffers)
        start = stop


def _times(graph: fx.Graph, part: fx.Node, coefficients: fx.Node, x: fx.Node) -> fx.Node:
    """linear(part, coefficients), where the part is a slice of features that has the leading dimensions of x.

    Its tokens are counted by one dimension for the product: a slice with more is no matrix to ATen, which multiplies it
    batch by batch. That took 3 times as long: q, k, v of width 2048 at rank 672, 128 tokens, bfloat16, two cores with
    AMX.
    """
    value = _torch.fake_value(x)
    linear = _torch.linear_function()
    if not isinstance(value, Tensor) or value.dim() < 3:
        return graph.call_function(linear, (part, coefficients))
    flat = graph.call_function(linear, (graph.call_function(torch.flatten, (part, 0, -2)), coefficients))
    lead = [size if type(size) is int else graph.call_method("size", (x, i)) for i, size in enumerate(value.shape[:-1])]
    return graph.call_function(torch.reshape, (flat, (*lead, -1)))


def _unstack(parts: Sequence[Tensor]) -> list[Callable[[Tensor], Tensor]]:
    """For each part: what makes it again from all of them in one."""
    ends = list(accumulate(len(part) for part in parts))
    return [partial(_slice, start, stop) for start, stop in pairwise([0, *ends])]


def _slice(start: int, stop: int, stacked: Tensor) -> Tensor:
    return stacked[start:stop].clone()
