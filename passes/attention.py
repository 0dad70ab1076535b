"""Spell out what torch captures as one call although linear layers are inside: nn.MultiheadAttention, fast paths.

    before   y, weights = multi_head_attention_forward(q, k, v, ..., in_proj_weight, ..., out_proj_weight, ...)
             y = _transformer_encoder_layer_fwd(x, ..., in_proj_weight, ..., linear_2_weight, ...)
    after    the same computation function by function, its linear layers among them

torch's own Python says what a call computes: it is run once on the fake values of the graph, and every function that it
calls becomes a node. The fast paths, which have no Python, are written out here in terms of the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode

from pifa_compile import _torch
from pifa_compile.passes.plan import CLOSED, Context, PassResult, in_place_of


def open_attention(gm: fx.GraphModule, context: Context) -> PassResult:
    """Replace each such call by the calls inside of it; one that cannot be followed stays, with the reason."""
    found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _BODIES]
    skipped: list[tuple[str, str]] = []
    for node in found:
        try:
            _open(node)
        except _Unknown as problem:
            node.meta[CLOSED] = str(problem)
            skipped.append((node.name, str(problem)))
    return PassResult(len(found), len(found) - len(skipped), tuple(skipped))


class _Unknown(Exception):
    """A call that cannot be written out."""


def _open(old: fx.Node) -> None:
    values = {n: _torch.fake_value(n) for n in old.all_input_nodes}
    with in_place_of(old) as graph:
        before = old.prev
        recorder = _Recorder(graph, values)
        given: Any = map_arg((old.args, dict(old.kwargs)), values.__getitem__)
        try:
            with _torch.fake_mode_of(values.values()), recorder:
                result = _BODIES[old.target](*given[0], **given[1])
            _take_over(old, result, recorder)
        except _Unknown:
            while old.prev is not before:
                graph.erase_node(old.prev)
            raise
    graph.erase_node(old)


def _take_over(old: fx.Node, result: Any, recorder: _Recorder) -> None:
    """Let the readers of a call read what its parts give."""
    if isinstance(result, Tensor):
        old.replace_all_uses_with(recorder.node(result))
        return
    parts = {user: user.args[1] for user in old.users if user.target is operator.getitem}
    if len(parts) != len(old.users):
        raise _Unknown(f"the outputs of {old.name} are handed on together")
    for user, index in parts.items():
        user.replace_all_uses_with(recorder.node(result[index]))
        user.graph.erase_node(user)


class _Recorder(TorchFunctionMode):
    """Writes every function that gives a tensor into a graph while it runs on fake values."""

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
        super().__init__()
        self._graph = graph
        self._nodes = {id(value): node for node, value in values.items() if isinstance(value, Tensor)}
        self._alive = list(values.values())  # an id says who a tensor is only as long as that lives

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that gives a tensor."""
        if id(tensor) not in self._nodes:
            raise _Unknown("a tensor comes from outside of the graph")
        return self._nodes[id(tensor)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if (isinstance(result, Tensor) and id(result) not in self._nodes) or _in_place(func):
            made = self._call(func, *(map_aggregate(a, self._written) for a in (args, kwargs or {})))
            made.meta["example_value"] = result
            self._nodes[id(result)] = made
            self._alive.append(result)
        elif isinstance(result, tuple | list) and any(isinstance(part, Tensor) for part in result):
            made = self._call(func, *(map_aggregate(a, self._written) for a in (args, kwargs or {})))
            for index, part in enumerate(result):
                item = self._nodes[id(part)] = self._graph.call_function(operator.getitem, (made, index))
                item.meta["example_value"] = part
            self._alive.append(result)
        return result

    def _call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        """A node as Dynamo would write it: methods by name, properties through getattr."""
        name = func.__name__
        if name == "__get__":
            return self._graph.call_function(getattr, (args[0], func.__self__.__name__))  # type: ignore[attr-defined]
        if name == "__getitem__":
            return self._graph.call_function(operator.getitem, args)
        if getattr(Tensor, name, None) is func:
            return self._graph.call_method(name, args, kwargs)
        return self._graph.call_function(func, args, kwargs)

    def _written(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value)
        return self._size(_torch.size_expression(value)) if isinstance(value, torch.SymInt) else value

    def _size(self, expression: sympy.Expr) -> Any:
        """A symbolic size as a node, made of the sizes that are inputs of the graph."""
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            for node in self._graph.find_nodes(op="placeholder"):
                value = _torch.fake_value(node)
                if isinstance(value, torch.SymInt) and _torch.size_expression(value) == expression:
                    return node
        elif expression.func in _ARITHMETIC:
            first, *rest = (self._size(part) for part in expression.args)
            for part in rest:
                first = self._graph.call_function(_ARITHMETIC[expression.func], (first, part))
            return first
        raise _Unknown(f"the size {expression} is not known in the graph")


_ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul}


def _in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


# --- what the calls compute ------------------------------------------------------------------------------------------

_attention = _torch.without_overrides(F.multi_head_attention_forward)


def _native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The fast path of nn.MultiheadAttention: batch first, one tensor as query, key and value."""
    masks: dict[str, Tensor] = {}
    if mask is not None:
        hidden = mask.to(torch.bool)  # as the fast path reads a mask, of whatever dtype
        if mask_type == 2:  # of queries and keys and sequences
            hidden = hidden.expand(query.shape[0], num_head, -1, -1).flatten(0, 1)
        masks["key_padding_mask" if mask_type == 1 else "attn_mask"] = hidden
    if not (query is key is value):
        raise _Unknown("attention between different tensors in the fast path of torch")
    x = query.transpose(0, 1)
    y, weights = _attention(
        x, x, x, embed_dim, num_head, qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias,
        training=False, need_weights=need_weights, average_attn_weights=average_attn_weights, **masks,
    )  # fmt: skip
    return y.transpose(0, 1), weights


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The fast path of nn.TransformerEncoderLayer: batch first, no dropout."""

    def attend(x: Tensor) -> Tensor:
        given = (embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False)
        return _native_attention(x, x, x, *given, mask_type=mask_type)[0]

    def feed(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed(x))


_BODIES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys(_torch.attention_fast_path(), _native_attention),
    **dict.fromkeys(_torch.encoder_layer_fast_path(), _encoder_layer),
}
