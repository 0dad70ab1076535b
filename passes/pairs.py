"""Low-rank pairs that a model already has: linear into linear with a small size between, and nothing else.

    before   h = linear(x, right, inner_bias); y = linear(h, left, bias)            right k x n, left m x k
    after    y = pifa::linear(x, factors of left @ right, bias + left @ inner_bias)

SVD-LLM, ASVD and LoRD leave such pairs behind. The product is the same in exact arithmetic, with fewer numbers. An
adapter, whose output is added to that of a dense layer over the same input, is a pair too, but meant to stay one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from pifa_compile import _torch
from pifa_compile.factors import numbers
from pifa_compile.layers import as_matrix
from pifa_compile.passes.plan import Context, LinearSite, PassResult

#: A pair is taken only where pivoting saves at least this share of its numbers.
LEAST_SAVING = 0.05

KEPT = "half of a pair that the run kept as a pair"
ADAPTER = "half of an adapter: its output is added to that of a dense layer over the same input"
ROUNDING = "half of a low-rank pair in {dtype}, where pivoting adds rounding error: options={{'pairs': True}} takes it"
FOLDED = "folded, with its bias, into {name}"


@dataclass(frozen=True)
class Pair:
    """Two sites of which the second reads nothing but the first: y = left (right x)."""

    inner: LinearSite
    outer: LinearSite

    def matrices(self) -> tuple[Tensor, Tensor]:
        """left (m x k) and right (k x n)."""
        assert self.inner.parameter is not None and self.outer.parameter is not None
        return as_matrix(self.outer.parameter, self.outer.layout), as_matrix(self.inner.parameter, self.inner.layout)


def find_pairs(gm: fx.GraphModule, context: Context) -> PassResult:
    """List the pairs of the graph in the plan; halves of adapters, and pairs not to be taken, stay as they are."""
    by_node = {site.node: site for site in context.plan.sites}
    matched = 0
    for outer in context.plan.sites:
        inner = by_node.get(outer.x)
        if inner is None or not (inner.open and outer.open) or not _is_pair(inner, outer):
            continue
        matched += 1
        reason = ADAPTER if _is_adapter(inner, outer, by_node) else _reason(inner, outer, context)
        if reason is not None:
            inner.reason = outer.reason = reason
        elif _saves(inner, outer):  # else two linear layers like any other
            context.plan.pairs.append(Pair(inner, outer))
    return PassResult(matched, 0, context.plan.skipped())


def take_pairs(gm: fx.GraphModule, context: Context) -> PassResult:
    """Give the pairs whose halves have no factors of their own the factors of their product."""
    waiting = [p for p in context.plan.pairs if not any(s.record and s.record.object for s in (p.inner, p.outer))]
    for pair, factors in zip(waiting, context.factor_pairs(waiting) if waiting else [], strict=True):
        pair.outer.factors, pair.outer.inner, pair.outer.reason = factors, pair.inner, None
        pair.inner.reason, pair.inner.folded = FOLDED.format(name=pair.outer.name), True
    return PassResult(len(context.plan.pairs), 0, context.plan.skipped())


def folded_bias(pair: Pair, bias: Tensor | None, inner_bias: Tensor | None) -> Tensor | None:
    """bias + left @ inner_bias (m), added in float64; None where the pair has neither."""
    if inner_bias is None:
        return bias
    left, _ = pair.matrices()
    through = left.double() @ inner_bias.detach().double()
    return (through if bias is None else through + bias.detach().double()).to(inner_bias.dtype)


def _is_pair(inner: LinearSite, outer: LinearSite) -> bool:
    """Whether nothing else reads the inner output, and its size is below both others."""
    if len(inner.node.users) != 1 or inner.channel != -1 or outer.channel != -1:
        return False
    m, n, k = _sizes(inner, outer)
    return k < min(m, n)


def _saves(inner: LinearSite, outer: LinearSite) -> bool:
    m, n, k = _sizes(inner, outer)
    return numbers("pifa", m, n, k) <= (1 - LEAST_SAVING) * numbers("pair", m, n, k)


def _sizes(inner: LinearSite, outer: LinearSite) -> tuple[int, int, int]:
    """m, n, and k between them."""
    assert inner.shape is not None and outer.shape is not None
    return outer.shape[0], inner.shape[1], inner.shape[0]


def _is_adapter(inner: LinearSite, outer: LinearSite, by_node: dict[fx.Node, LinearSite]) -> bool:
    return any(True for _ in _summands(outer.node, _origin(inner.x), by_node))


def _reason(inner: LinearSite, outer: LinearSite, context: Context) -> str | None:
    """Why a pair stays one, or None."""
    assert inner.parameter is not None and outer.parameter is not None
    if any(_torch.innermost_module(s.node) == "PairLinear" for s in (inner, outer)):
        return KEPT
    dtypes = {inner.parameter.dtype, outer.parameter.dtype}
    values = [_torch.fake_value(s.node) for s in (inner, outer)]
    if len(dtypes) > 1 or any(isinstance(v, Tensor) and v.dtype not in dtypes for v in values):
        return "half of a low-rank pair whose dtypes differ"
    if context.settings.pairs is False:
        return "half of a low-rank pair, which options={'pairs': False} leaves alone"
    (dtype,) = dtypes
    if dtype.itemsize < 4 and not context.settings.pairs:
        return ROUNDING.format(dtype=_torch.dtype_name(dtype))
    return None


def _summands(node: fx.Node, origin: fx.Node, by_node: dict[fx.Node, LinearSite]) -> Iterator[LinearSite]:
    """The linear layers over the same input whose output is added, somewhere, to that of ``node``."""
    for user in node.users:
        if _name(user) in _SCALINGS:
            yield from _summands(user, origin, by_node)
        elif _name(user) in _SUMS:
            for other in user.all_input_nodes:
                if other is not node:
                    yield from (s for s in _terms(other, by_node) if _origin(s.x) is origin)


def _terms(node: fx.Node, by_node: dict[fx.Node, LinearSite]) -> Iterator[LinearSite]:
    """The linear layers that a sum is made of."""
    if node in by_node:
        yield by_node[node]
    elif _name(node) in _SCALINGS | _SUMS:
        for inner in node.all_input_nodes:
            yield from _terms(inner, by_node)


def _origin(node: fx.Node) -> fx.Node:
    """The node behind casts and dropouts."""
    while _name(node) in _PASSING and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


_SUMS = frozenset({"add", "iadd", "add_"})
_PASSING = frozenset({"to", "float", "half", "bfloat16", "type", "dropout", "contiguous", "clone"})
_SCALINGS = _PASSING | {"mul", "imul", "mul_", "truediv", "div", "view", "reshape"}
