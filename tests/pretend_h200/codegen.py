"""Inductor's generated program for a pretend H200, and the Triton kernels in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx

from pretend_h200.device import pretend_h200


def generate(
    function: Callable[..., Any],
    arguments: Callable[[], Sequence[Any]],
    *,
    seconds: Callable[[Any], float] | None = None,
    **settings: Any,
) -> str:
    """The program that Inductor writes for ``function``.

    arguments  makes its (fake, CUDA) arguments inside the context
    seconds    the pretended time of a choice, so that a test decides which one wins; default: the first
    settings   of Inductor
    """
    from torch._inductor import config, select_algorithm
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import fresh_inductor_cache
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def measured(choices: Sequence[Any], *_: Any, **__: Any) -> dict[Any, float]:
        return {c: float(i + 1) if seconds is None else seconds(c) for i, c in enumerate(choices)}

    cache = select_algorithm.AlgorithmSelectorCache
    settings = {"compile_threads": 1, "benchmark_epilogue_fusion": False, "fx_graph_cache": False} | settings
    if torch.__version__ < "2.13":
        settings["loop_ordering_after_fusion"] = False
    with ExitStack() as stack:
        stack.enter_context(fresh_inductor_cache())  # no measurement of an earlier test
        stack.enter_context(pretend_h200())
        stack.enter_context(config.patch(settings))
        stack.enter_context(mock.patch.object(cache, "make_benchmark_fn", classmethod(lambda *_, **__: measured)))
        stack.enter_context(mock.patch.object(cache, "make_precompile_fn", lambda *_, **__: dict))
        mode = FakeTensorMode(shape_env=ShapeEnv())
        with mode, torch.no_grad():
            given = list(arguments())
            dynamic = any(isinstance(size, torch.SymInt) for t in given for size in t.shape)
            trace = make_fx(
                function,
                decomposition_table=select_decomp_table(),
                tracing_mode="symbolic" if dynamic else "real",
                _allow_non_fake_inputs=True,
            )
            graph: fx.GraphModule = trace(*given)
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        _recursive_post_grad_passes(graph, is_inference=True)
        lowered = GraphLowering(graph, example_inputs=given, shape_env=mode.shape_env, is_inference=True)
        with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]):
            lowered.run(*given)
            program = lowered.codegen()[0]
    return str(getattr(program, "value", program))


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A CUDA tensor without memory; only within ``arguments`` of ``generate``."""
    return torch.empty(shape, dtype=dtype, device="cuda")


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel of a program: its plain source, and how it is compiled and launched."""

    name: str
    source: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    aligned: tuple[int, ...]  # arguments that are multiples of 16 bytes
    early: bool  # launched while the kernel ahead of it still runs


PRELUDE = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math

"""


def kernels(program: str) -> list[Kernel]:
    """The Triton kernels that the program defines, in order; one that is launched often stands there once."""
    return [_kernel(text) for text in re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", program, re.S)]


def tails(program: str) -> list[Kernel]:
    """Those that write whole outputs: they read a row order, few_tail.jinja one of each layer."""
    return [k for k in kernels(program) if {"arg_ROW_ORDER", "arg_O0"} & {*k.signature}]


def launches(program: str) -> list[str]:
    """The names of the Triton kernels that the program launches, in order."""
    return re.findall(r"^\s+(\w+)\.run\(", program, re.M)


def _kernel(text: str) -> Kernel:
    function = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)][-1]
    heuristics = next(d for d in function.decorator_list if isinstance(d, ast.Call))
    keywords = {k.arg: ast.unparse(k.value) for k in heuristics.keywords}
    meta = keywords["triton_meta"]
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("@triton.jit"))
    return Kernel(
        name=function.name,
        source=PRELUDE + "\n".join(lines[start:]),
        signature=_literal(meta, "signature"),
        constants=_literal(meta, "constants"),
        warps=int(keywords.get("num_warps", 4)),
        stages=int(keywords.get("num_stages", 3)),
        aligned=tuple(int(i) for i in re.findall(r"\((\d+),\): \[\['tt.divisibility', 16\]\]", meta)),
        early="'launch_pdl': True" in meta,
    )


def _literal(meta: str, key: str) -> dict[str, Any]:
    found = re.search(rf"'{key}': (\{{.*?\}})", meta)
    return {} if found is None else dict(ast.literal_eval(found.group(1)))
