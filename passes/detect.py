"""Find every linear layer of a Dynamo graph and say why those that cannot be replaced cannot."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from pifa_compile import _torch
from pifa_compile.factors import PifaFactors
from pifa_compile.kernels import op
from pifa_compile.layers import is_output_embedding_name, supported_dtype
from pifa_compile.passes.forms import Match, made_of, match_linear, rooted_in_parameter, view_of_parameter
from pifa_compile.passes.plan import Context, LinearSite, PassResult, argument

GRADIENT = (
    "trainable weight while gradients are on: call the model under torch.no_grad() or torch.inference_mode(), "
    "or accept the loss of its gradient with options={'allow_grad': True}"
)
FSDP = (
    "gathered by FSDP for every call, so that nobody can tell whether it changed: shard a prepared model, "
    "or say that it does not change with options={'staleness': 'off'}"
)


def detect(gm: fx.GraphModule, context: Context) -> PassResult:
    """Fill the plan with one site per linear layer, in whatever form it stands; the graph stays as it is."""
    counted: set[fx.Node] = set()
    mixed = _torch.autocast_is_on() or any(_torch.autocast_begins(node) for node in gm.graph.nodes)
    for node in gm.graph.nodes:
        if node.target is op.linear:
            context.plan.sites.append(_prepared_site(node, context, counted))
        elif (match := match_linear(node)) is not None:
            site = _site(node, match, context)
            if site.open and not mixed:
                site.reason = _other_dtype(site)
            context.plan.sites.append(site)
    return PassResult(len(context.plan.sites), 0, context.plan.skipped())


def _site(node: fx.Node, match: Match, context: Context) -> LinearSite:
    value = context.values.get(match.weight)
    weight = match.weight if isinstance(value, Tensor) else None
    site = LinearSite(
        node=node,
        x=match.x,
        weight=weight,
        bias=match.bias,
        parameter=value if weight is not None else None,
        name=_name(match.weight, weight),
        source=source_line(node),
        layout=match.layout,
        channel=match.channel,
        through=match.through,
    )
    site.reason = match.reason or view_of_parameter(match.weight) if value is None else None
    if site.reason is None and isinstance(value, Tensor):
        site.reason = _reason(site, value, match.weight, context) or match.reason
        if site.reason is None and value.dim() < 2:
            site.reason = "the weight is a vector"
    return site


def _name(given: fx.Node, weight: fx.Node | None) -> str:
    """The layer's name by its parameter ``weight``, else by what the weight that is given is computed from."""
    source = weight
    if source is None and given.op != "placeholder" and not rooted_in_parameter(given):
        source = made_of(given)
    return given.name if source is None else _torch.placeholder_name(source).removesuffix(".weight")


def _prepared_site(node: fx.Node, context: Context, counted: set[fx.Node]) -> LinearSite:
    """A layer that came with factors: nothing to look up, but passes that follow may work on it.

    counted  the pivot rows of such layers so far, to be added to: layers that share them count them once
    """
    x, *parts = (argument(node, i, name) for i, name in enumerate(("x", "pivot_rows", "coefficients", "row_order")))
    tensors = [context.values.get(part) for part in parts if part is not None]
    name = _torch.placeholder_name(parts[0]).removesuffix(".pivot_rows") if parts[0] is not None else node.name
    site = LinearSite(
        node, x or node, None, argument(node, 4, "bias"), None, name, source_line(node), row_order=parts[2]
    )
    if len(tensors) == 3 and all(isinstance(t, Tensor) for t in tensors):
        rows, coefficients, order = (t.detach() for t in tensors if isinstance(t, Tensor))
        y_scale = node.args[5] if len(node.args) > 5 else node.kwargs.get("y_scale", 1.0)
        site.factors = PifaFactors(rows, coefficients, order, float(y_scale))  # type: ignore[arg-type]
    if parts[0] is not None:
        site.shares_pivots = parts[0] in counted
        counted.add(parts[0])
    site.rows = next(filter(None, map(_own_rows, node.users)), None)
    return site


def _own_rows(user: fx.Node) -> tuple[int, int] | None:
    """The rows that PifaLinear's ``rows`` takes out of factors that it shares; None for what somebody else takes."""
    if user.target != "narrow" or _torch.innermost_module(user) != "PifaLinear":
        return None
    start, length = user.args[2:]
    return (start, start + length) if isinstance(start, int) and isinstance(length, int) else None


def _reason(site: LinearSite, weight: Tensor, placeholder: fx.Node, context: Context) -> str | None:
    """The first thing that speaks against replacing the layer, or None."""
    for pattern in context.settings.skip:
        if fnmatchcase(site.name, pattern):
            return f"skipped by the pattern {pattern!r}"
    if is_output_embedding_name(site.name) or _feeds_embedding(placeholder):
        return "output embedding, left dense by default"
    if not supported_dtype(weight.dtype):
        return f"{weight.dtype} weight: only float64, float32, float16 and bfloat16 are replaced"
    if not isinstance(weight, nn.Parameter):
        return "the weight is a plain tensor, not a parameter"
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"the weight is a {type(weight).__name__} ({weight.layout}), not a plain parameter"
    if weight.is_meta:
        return "the weight is on the meta device and has no content"
    if _torch.innermost_module(site.node) == "PifaLinear":
        return "a factor of a prepared layer"
    if context.settings.staleness != "off" and _torch.gathered_by_fsdp(placeholder):
        return FSDP
    if torch.is_grad_enabled() and weight.requires_grad and not context.settings.allow_grad:
        return GRADIENT
    return None


def _other_dtype(site: LinearSite) -> str | None:
    """Why the call is none that runs: its input has another dtype than its weight."""
    x = _torch.fake_value(site.x)
    if site.parameter is None or not isinstance(x, Tensor) or x.dtype == site.parameter.dtype:
        return None
    return f"its input is {x.dtype}, its weight {site.parameter.dtype}"


def _feeds_embedding(placeholder: fx.Node) -> bool:
    return any(user.target is torch.nn.functional.embedding for user in placeholder.users)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]*)')


def source_line(node: fx.Node) -> str:
    """The innermost line outside torch and this package that made the node, as ``file.py:12 code``; or empty."""
    frames = [f for f in _FRAME.finditer(node.meta.get("stack_trace") or "") if not _is_library(f["file"])]
    if not frames:
        return ""
    last = frames[-1]
    return f"{Path(last['file']).name}:{last['line']} {last['code'].strip()}"


_LIBRARIES = (Path(torch.__file__).parent, Path(op.__file__).parents[1])


def _is_library(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in _LIBRARIES)
