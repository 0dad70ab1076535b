"""The forms in which a linear layer stands in a Dynamo graph, each recognised by one small function.

m = out_features, n = in_features.

    linear(x, W, b)            addmm(b, x, W.t())       matmul(x, W.T), x @ W.T, mm        einsum("bsi,oi->bso", x, W)
    W @ x: a linear layer over the last dimension but one
    conv1d/2d/3d(x, W, b) with a kernel of one point: a linear layer over the channels

W may be a parameter or its transpose (t(), T, mT, transpose, permute); GPT-2's Conv1D is an addmm with W as n x m.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pifa_compile import _torch
from pifa_compile.layers import Layout
from pifa_compile.passes.plan import CLOSED, argument


@dataclasses.dataclass(frozen=True)
class Match:
    """A call that is a linear layer, or would be one but for ``reason``.

    x        the activations; weight: what is given as the weight (a placeholder, or a node that views or computes one)
    through  the nodes between the placeholder and the call (transposes)
    channel  the dimension of x that is contracted, counted from the end (-1 but for convolutions and W @ x)
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    layout: Layout = "out_in"
    through: tuple[fx.Node, ...] = ()
    channel: int = -1
    reason: str | None = None


def match_linear(node: fx.Node) -> Match | None:
    """The linear layer that a call is, or None if it is none (or has no parameter to replace)."""
    recognise = _closed if CLOSED in node.meta else _FORMS.get(_target(node))
    return recognise(node) if recognise is not None else None


def _target(node: fx.Node) -> Any:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    return _torch.operator_name(node.target) or node.target  # by name: another package's need not be there


# --- one recogniser per form -----------------------------------------------------------------------------------------


def _linear(node: fx.Node) -> Match | None:
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    if x is None or weight is None:
        return None
    return _with_weight(x, weight, argument(node, 2, "bias"), transposed=True)


def _matmul(node: fx.Node) -> Match | None:
    x, weight = argument(node, 0, "input"), argument(node, 1, "other") or argument(node, 1, "mat2")
    if x is None or weight is None:
        return None
    if rooted_in_parameter(weight):
        return _with_weight(x, weight, None, transposed=False)
    return _left(x, weight) if rooted_in_parameter(x) else None


def _left(weight: fx.Node, x: fx.Node) -> Match:
    """W @ x, with W of two dimensions and x of two or more."""
    match = _with_weight(x, weight, None, transposed=True)
    value = _torch.fake_value(x)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return _because(match, "the weight stands on the left of a vector")
    return dataclasses.replace(match, channel=-2)


def _addmm(node: fx.Node) -> Match | None:
    bias, x, weight = argument(node, 0, "input"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
    if bias is None or x is None or weight is None or not rooted_in_parameter(weight):
        return None
    match = _with_weight(x, weight, bias, transposed=False)
    scales = [node.kwargs.get(key, 1) for key in ("beta", "alpha")]
    if scales != [1, 1]:
        return _because(match, f"addmm with beta {scales[0]} and alpha {scales[1]}")
    value = _torch.fake_value(bias)
    if isinstance(value, Tensor) and value.dim() != 1:
        return _because(match, f"addmm onto a matrix of shape {tuple(value.shape)}, not a bias")
    return match


def _einsum(node: fx.Node) -> Match | None:
    operands = [a for arg in node.args[1:] for a in (arg if isinstance(arg, tuple | list) else (arg,))]
    weights = [a for a in operands if isinstance(a, fx.Node) and rooted_in_parameter(a)]
    if not weights or not isinstance(node.args[0], str):
        return None
    weight = weights[0]
    others = [a for a in operands if a is not weight]
    x = next((a for a in others if isinstance(a, fx.Node)), weight)
    transposed = _einsum_transposed(node.args[0], operands.index(weight)) if len(operands) == 2 else None
    if transposed is None or x is weight:
        value = _torch.fake_value(weight)
        stack = isinstance(value, Tensor) and value.dim() > 2 and len(operands) == 2
        if stack and not _einsum_stack(node.args[0], operands.index(weight)):
            reason = f"einsum {node.args[0]!r} with a {value.dim()}-dimensional parameter"
            return Match(x, _base(weight)[0], reason=reason)
        reason = f"einsum {node.args[0]!r} is no linear layer over the last dimension"
        return _because(_with_weight(x, weight, None, transposed=True), reason)
    return _with_weight(x, weight, None, transposed=transposed)


def _einsum_transposed(equation: str, position: int) -> bool | None:
    """Whether the weight stands as m x n (True) or n x m (False) in a two-operand equation; None if neither."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2:
        return None
    weight, x = parts[position], parts[1 - position]
    letters = x.replace(".", "")
    if len(weight) != 2 or "." in weight or len(set(letters)) != len(letters):
        return None
    for inner, outer, transposed in ((weight[1], weight[0], True), (weight[0], weight[1], False)):
        if x.endswith(inner) and output == x[:-1] + outer and outer not in x and inner != outer:
            return transposed
    return None


def _einsum_stack(equation: str, position: int) -> bool:
    """Whether the first dimension of the weight is one of x and of the output: then it counts matrices."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    first = parts[position][:1]
    return first.isalpha() and first in parts[1 - position] and first in output


def _convolution(node: fx.Node) -> Match | None:
    x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    value = _torch.fake_value(weight) if weight is not None else None
    if x is None or weight is None or not isinstance(value, Tensor) or any(k != 1 for k in value.shape[2:]):
        return None
    match = Match(x, _base(weight)[0], bias, "conv1x1", _base(weight)[1], channel=1 - value.dim())
    names, defaults = ("stride", "padding", "dilation", "groups"), (1, 0, 1, 1)
    given = [node.args[i + 3] if len(node.args) > i + 3 else node.kwargs.get(n) for i, n in enumerate(names)]
    stride, padding, _, groups = (d if g is None else g for g, d in zip(given, defaults, strict=True))
    for what, found, wanted in (("stride", stride, 1), ("padding", padding, 0), ("groups", groups, 1)):
        if any(f != wanted for f in (found if isinstance(found, tuple | list) else (found,))) and found != "valid":
            return _because(match, f"1x1 convolution with {what} {found}")
    return match


def _batched(node: fx.Node) -> Match | None:
    """Products with a stack of matrices (fused experts): found so that the reason is told, never replaced.

    Tokens are sorted by expert and multiplied group by group. In pivoted form each expert would have a rank, a second
    product and an order of its own: that takes a kernel made for it, not another form of this call.
    """
    for weight in node.all_input_nodes:
        base = _root(weight)
        if isinstance(value := _parameter(base), Tensor) and value.dim() > 2:
            x = next((a for a in node.all_input_nodes if a is not weight), weight)
            return Match(
                x, base, reason=f"a stack of {value.shape[0]} weights in one {value.dim()}-dimensional parameter"
            )
    return None


def _quantized(node: fx.Node) -> Match | None:
    """A product with a quantized weight: found so that the reason is told, never replaced."""
    x, weight = argument(node, 0, "self"), argument(node, 1, "mat2")
    if x is None or weight is None or made_of(weight) is None:
        return None
    reason = f"a product with a weight of {_torch.fake_value(weight).dtype} whose scales stand apart"
    return _because(_with_weight(x, weight, None, transposed=False), reason)


def _closed(node: fx.Node) -> Match | None:
    """A call with linear layers inside that could not be written out, under the name of the first weight it reads."""
    inputs = node.all_input_nodes
    weights = [n for n in inputs if isinstance(value := _parameter(n), Tensor) and value.dim() > 1]
    return Match(inputs[0], weights[0], reason=f"inside of {node.name}: {node.meta[CLOSED]}") if weights else None


_FORMS: dict[Any, Callable[[fx.Node], Match | None]] = {
    _torch.linear_function(): _linear,
    torch.matmul: _matmul,
    operator.matmul: _matmul,
    torch.mm: _matmul,
    "matmul": _matmul,
    "mm": _matmul,
    torch.addmm: _addmm,
    "addmm": _addmm,
    torch.functional.einsum: _einsum,
    torch.einsum: _einsum,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.bmm: _batched,
    torch.baddbmm: _batched,
    "bmm": _batched,
}
_FORMS |= dict.fromkeys((*_torch.grouped_products(), "transformers.grouped_mm_fallback"), _batched)
_FORMS |= dict.fromkeys(_torch.quantized_products(), _quantized)


# --- what is given as the weight -------------------------------------------------------------------------------------


def _with_weight(x: fx.Node, weight: fx.Node, bias: fx.Node | None, *, transposed: bool) -> Match:
    """A match for y = x @ weight.T (``transposed``) or x @ weight, looking through transposes of the parameter."""
    base, through = _base(weight)
    value = _torch.fake_value(base)
    if isinstance(value, Tensor) and value.dim() > 2:
        what = f"a stack of {value.shape[0]} weights in one {value.dim()}-dimensional parameter"
        return Match(x, base, bias, reason=what)
    as_given = transposed if len(through) % 2 == 0 else not transposed
    return Match(x, base, bias, "out_in" if as_given else "in_out", through)


def _base(weight: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node behind transposes of a matrix, and those transposes."""
    through: list[fx.Node] = []
    while (inner := _transposed(weight)) is not None:
        through.append(weight)
        weight = inner
    return weight, tuple(through)


def _transposed(node: fx.Node) -> fx.Node | None:
    """What a node is the matrix transpose of, or None."""
    value = _torch.fake_value(node)
    if (
        not node.args
        or not isinstance(inner := node.args[0], fx.Node)
        or not isinstance(value, Tensor)
        or value.dim() != 2
    ):
        return None
    rest = node.args[1:]
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if target in ("t", "numpy_T", "adjoint") and not rest:
        return inner
    if target == "getattr" and rest in (("T",), ("mT",)):
        return inner
    if target in ("transpose", "swapaxes", "swapdims") and sorted(d % 2 for d in rest if isinstance(d, int)) == [0, 1]:
        return inner
    flat = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if target == "permute" and [d % 2 for d in flat if isinstance(d, int)] == [1, 0]:
        return inner
    return None


def rooted_in_parameter(node: fx.Node) -> bool:
    """Whether the node is a parameter or made from one by views alone, so that a reader would call it a weight."""
    return _parameter(_root(node)) is not None


def _root(node: fx.Node) -> fx.Node:
    """The node that views, one of another, are of."""
    while node.op != "placeholder" and node.args and isinstance(node.args[0], fx.Node) and _is_view(node):
        node = node.args[0]
    return node


_VIEWS = ("t", "getattr", "transpose", "permute", "getitem", "chunk", "split", "narrow", "view", "reshape", "unbind")


def _is_view(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _VIEWS


def _parameter(node: fx.Node) -> Tensor | None:
    """The fake value of a placeholder that holds a parameter, else None."""
    value = _torch.fake_value(node)
    return value if node.op == "placeholder" and isinstance(value, nn.Parameter) else None


def view_of_parameter(node: fx.Node) -> str:
    """What a weight that is no placeholder is, in words."""
    if node.op == "get_attr":
        return "the weight is a constant of the graph, not a parameter"
    if node.op == "placeholder" or not rooted_in_parameter(node):
        source = made_of(node)
        of = f" from {_torch.placeholder_name(source)}, {_torch.fake_value(source).dtype}" if source is not None else ""
        return f"the weight is computed in the graph ({node.name}{of}), not a parameter"
    base = node
    while base.op != "placeholder" and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    name = _torch.placeholder_name(base)
    return f"the weight is a part or view of the parameter {name}, not the whole of it"


def made_of(node: fx.Node) -> fx.Node | None:
    """The largest parameter or buffer that a node is computed from; None where an input of the model is among them."""
    seen, waiting, found = set[fx.Node](), [node], []
    while waiting:
        inner = waiting.pop()
        if inner not in seen:
            seen.add(inner)
            waiting += inner.all_input_nodes
            if inner.op == "placeholder" and isinstance(value := _torch.fake_value(inner), Tensor):
                if not _torch.is_of_module(inner):
                    return None
                found.append((value.numel(), inner))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _because(match: Match, reason: str) -> Match:
    return dataclasses.replace(match, reason=match.reason or reason)
