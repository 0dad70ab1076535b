"""Find every linear layer of a Dynamo graph and say why those that cannot be replaced cannot."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from pifa_compile import _torch
from pifa_compile.layers import is_output_embedding_name, supported_dtype
from pifa_compile.passes.plan import Context, LinearSite, PassResult, argument

GRADIENT = (
    "trainable weight while gradients are on: call the model under torch.no_grad() or torch.inference_mode(), "
    "or accept the loss of its gradient with options={'allow_grad': True}"
)


def detect(gm: fx.GraphModule, context: Context) -> PassResult:
    """Fill the plan with one site per ``F.linear``; the graph stays as it is."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is _torch.linear_function():
            context.plan.sites.append(_site(node, context))
    return PassResult(len(context.plan.sites), 0, context.plan.skipped())


def _site(node: fx.Node, context: Context) -> LinearSite:
    weight = argument(node, 1, "weight")
    bias = argument(node, 2, "bias")
    source = source_line(node)
    if not isinstance(weight, fx.Node) or weight.op != "placeholder":
        name = weight.name if isinstance(weight, fx.Node) else node.name
        return LinearSite(node, None, bias, None, name, source, reason=_derived(weight))
    value = context.values.get(weight)
    name = _torch.placeholder_name(weight).removesuffix(".weight")
    if not isinstance(value, Tensor):
        return LinearSite(node, weight, bias, None, name, source, reason="the weight is no tensor")
    site = LinearSite(node, weight, bias, value, name, source)
    site.reason = _reason(site, value, weight, context)
    return site


def _derived(weight: fx.Node | None) -> str:
    if weight is None:
        return "the weight is a constant of the graph"
    return f"the weight is computed in the graph ({weight.name}), not a parameter"


def _reason(site: LinearSite, weight: Tensor, placeholder: fx.Node, context: Context) -> str | None:
    """The first thing that speaks against replacing the layer, or None."""
    for pattern in context.settings.skip:
        if fnmatchcase(site.name, pattern):
            return f"skipped by the pattern {pattern!r}"
    if is_output_embedding_name(site.name) or _feeds_embedding(placeholder):
        return "output embedding, left dense by default"
    if not isinstance(weight, nn.Parameter):
        return "the weight is a plain tensor, not a parameter"
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"the weight is a {type(weight).__name__} ({weight.layout}), not a plain parameter"
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} dimensions, not two"
    if not supported_dtype(weight.dtype):
        return f"{weight.dtype} weight: only float64, float32, float16 and bfloat16 are replaced"
    if torch.is_grad_enabled() and weight.requires_grad and not context.settings.allow_grad:
        return GRADIENT
    return None


def _feeds_embedding(placeholder: fx.Node) -> bool:
    return any(user.target is torch.nn.functional.embedding for user in placeholder.users)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')


def source_line(node: fx.Node) -> str:
    """The innermost line of code outside torch that made the node, as ``file.py:12 code``; empty if unknown."""
    frames = [f for f in _FRAME.finditer(node.meta.get("stack_trace") or "") if not _inside_torch(f["file"])]
    if not frames:
        return ""
    last = frames[-1]
    return f"{Path(last['file']).name}:{last['line']} {last['code'].strip()}"


_TORCH = Path(torch.__file__).parent


def _inside_torch(file: str) -> bool:
    return Path(file).is_relative_to(_TORCH)
