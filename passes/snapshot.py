"""A graph at one moment, as data: passes rewrite it, and a node that is erased forgets what it read."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from pifa_compile import _torch
from pifa_compile.passes.detect import source_line
from pifa_compile.passes.plan import ORIGIN, Plan

LONGEST = 120  # characters of constant arguments that are kept


class Snapshot:
    """A graph as it stands now.

    facts    name, operator, shape, ... of every node as JSON, in order; what is not known is left out
    inputs   the nodes that each node reads
    sites    the node of every linear layer of the plan
    """

    def __init__(self, graph: fx.Graph, plan: Plan, earlier: Snapshot | None = None) -> None:
        """Nodes that an ``earlier`` snapshot has with the same operator keep the facts that they have there."""
        known = earlier.facts if earlier is not None else {}
        values: dict[fx.Node, Any] = {}
        sources: dict[str, str] = {}
        self.facts: dict[fx.Node, dict[str, Any]] = {}
        self.inputs = {node: list(node.all_input_nodes) for node in graph.nodes}
        self.sites = [site.node for site in plan.sites]
        for node in graph.nodes:
            values[node] = _value(node, values)
            same = node in known and known[node]["op"] == op_name(node)
            self.facts[node] = known[node] if same else _facts(node, values[node], sources)


def op_name(node: fx.Node) -> str:
    """The operator as a reader would write it: ``linear``, ``.view``, ``pifa.linear.default``, ``placeholder``."""
    target: Any = node.target
    if not node.op.startswith("call_"):
        return node.op
    if isinstance(target, str):
        return f".{target}"
    return str(target) if "OpOverload" in type(target).__name__ else str(getattr(target, "__name__", target))


def _facts(node: fx.Node, value: Any, sources: dict[str, str]) -> dict[str, Any]:
    """``sources`` remembers parsed stack traces: many nodes share one."""
    trace = node.meta.get("stack_trace") or ""
    if trace not in sources:
        sources[trace] = source_line(node)
    label = _torch.placeholder_name(node) if node.op == "placeholder" else node.name
    facts = {
        "name": node.name,
        "op": op_name(node),
        "label": label if label != node.name else None,
        "constants": _constants(node),
        "module": _module(node) if node.op != "placeholder" else "",
        "source": sources[trace],
    }
    return {key: fact for key, fact in facts.items() if fact} | _describe(value)


def _constants(node: fx.Node) -> str:
    """The arguments that hold no node: dimensions, sizes, flags; empty if all are None."""
    if not node.op.startswith("call_"):
        return ""
    plain = [str(a) for a in node.args if not _holds_node(a)]
    plain += [f"{key}={a}" for key, a in node.kwargs.items() if not _holds_node(a)]
    text = ", ".join(plain) if set(plain) != {"None"} else ""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _holds_node(argument: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(argument, found.append)
    return bool(found)


def _module(node: fx.Node) -> str:
    """The path of the innermost module that the node was called in; empty for the outermost one."""
    paths = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    return "" if not paths or paths[-1] in ("", "L['self']") else _torch.dotted(paths[-1])


def _describe(value: Any) -> dict[str, Any]:
    """Shape, dtype, device and bytes of a tensor, the kind of anything else. Symbolic sizes are text."""
    if value is None:
        return {}
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        return {"value": f"{kind} of {len(value)}" if isinstance(value, list | tuple) else kind}
    shape = [size if type(size) is int else str(size) for size in value.shape]
    facts = {"shape": shape, "dtype": _torch.dtype_name(value.dtype), "device": str(value.device)}
    return facts | ({"bytes": value.nbytes} if all(type(size) is int for size in shape) else {})


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What is known of the node's value; it is worked out where a pass wrote the node and noted none."""
    value = _torch.fake_value(node)
    if value is not None or ORIGIN not in node.meta or not node.op.startswith("call_"):
        return value
    mode = next((v.fake_mode for v in values.values() if hasattr(v, "fake_mode")), None)
    try:
        return _call(node, values, mode) if mode is not None else None
    except Exception:  # whatever an operator says to a value that is not known: then no shape is shown
        return None


def _call(node: fx.Node, values: dict[fx.Node, Any], mode: Any) -> Any:
    """The node on fake values, leaving no guard and no size behind: looking must not change what is compiled."""

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor) or hasattr(value, "fake_mode"):
            return value
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    with nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards():
        args: Any = map_arg(node.args, lambda n: fake(values[n]))
        kwargs: Any = map_arg(node.kwargs, lambda n: fake(values[n]))
        target: Any = node.target
        return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
