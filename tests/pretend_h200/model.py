"""The graph that the passes of this package leave of a model on CUDA, and Inductor's program for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from pifa_compile import backend
from pifa_compile.kernels import lowering
from pifa_compile.passes import group, pipeline
from pifa_compile.passes.plan import Context, PassResult
from pretend_h200.codegen import generate
from pretend_h200.device import pretend_h200


def graph_on_cuda(model: nn.Module, inputs: Sequence[Tensor], **options: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that the backend hands to Inductor, were the model on CUDA, and its inputs.

    The passes run on the real weights, on the CPU; ``group`` is told that they are on the card; ``decompose`` is for
    the CPU and left out.
    """
    taken: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, given: list[Any], *_: Any) -> Callable[..., Any]:
        taken.append((gm, given))
        return gm.forward

    steps = tuple(
        replace(step, run=_group_on_cuda) if step.name == "group" else step
        for step in pipeline.PIPELINE
        if step.name != "decompose"
    )
    with mock.patch.object(pipeline, "PIPELINE", steps), mock.patch.object(backend, "_compile_inner", keep):
        torch.compile(model, backend=backend.pifa, options=options, fullgraph=True)(*inputs)
    ((gm, given),) = taken
    return gm, given


def _group_on_cuda(gm: fx.GraphModule, context: Context) -> PassResult:
    with pretend_h200(), mock.patch.object(group, "_device", lambda _: torch.device("cuda", 0)):
        return group.group(gm, context)


def program_of(gm: fx.GraphModule, given: Sequence[Any], **settings: Any) -> str:
    """Inductor's program for the graph on the pretended device.

    The graph becomes one of aten operators on the CPU, where its Python can run, with its buffers as inputs, as
    AOTAutograd makes them; then whatever names the CPU is made to name the card.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    buffers = [node for node in gm.graph.nodes if node.op == "get_attr"]
    values = [*given, *(gm.get_buffer(str(node.target)) for node in buffers)]

    def run(*arguments: Any) -> Any:
        attributes = dict(zip(buffers, arguments[len(given) :], strict=True))
        return _WithAttributes(gm, attributes).run(*arguments[: len(given)])

    trace = make_fx(run, decomposition_table=select_decomp_table(), tracing_mode="fake", _allow_non_fake_inputs=True)
    with torch.no_grad():
        graph = trace(*values)
    for node in graph.graph.nodes:
        node.kwargs = {key: _on_cuda(value) for key, value in node.kwargs.items()}
    graph.recompile()

    def arguments() -> list[Any]:
        lowering.register()
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in values]

    return generate(fx.Interpreter(graph).run, arguments, **settings)


class _WithAttributes(fx.Interpreter):
    """Runs a graph with values that are given for its attributes."""

    def __init__(self, gm: fx.GraphModule, attributes: dict[fx.Node, Any]) -> None:
        super().__init__(gm)
        self._attributes = attributes

    def run_node(self, n: fx.Node) -> Any:
        return self._attributes[n] if n.op == "get_attr" else super().run_node(n)


def _on_cuda(value: Any) -> Any:
    return torch.device("cuda", 0) if isinstance(value, torch.device) else value
