"""The private names of torch that this package uses, all of them, in one place.

Checked by the tests with torch 2.13.0, 2.12.1 and 2.11.0. Nothing else here imports a name with an
underscore from torch; when a torch release moves one, this file is the only one to change.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx


def counters() -> Counter[str]:
    """Counts of this package beside those of Dynamo and Inductor: torch._dynamo.utils.counters["pifa"]."""
    from torch._dynamo.utils import counters as all_counters

    found: Counter[str] = all_counters["pifa"]
    return found


def inductor_keys() -> frozenset[str]:
    """The names of all Inductor settings."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def mode_settings(mode: str) -> dict[str, Any]:
    """The Inductor settings that a torch.compile mode stands for; raises RuntimeError on an unknown mode."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def compile_inner(gm: fx.GraphModule, inputs: list[Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """Inductor on a Dynamo graph, with ``settings`` in force while it compiles."""
    from torch._inductor.compile_fx import compile_fx

    # 2.11 fuses nothing into a template behind an activation of three dimensions unless it leaves loops in their order.
    fusing = {"loop_ordering_after_fusion": False} if torch.__version__ < "2.12" else {}
    compiled: Callable[..., Any] = compile_fx(gm, inputs, config_patches=fusing | settings)  # type: ignore[assignment]
    return compiled


def compile_package(program: Any, path: Path) -> None:
    """Compile an exported program ahead of time, with AOTInductor, into a file."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def compile_cpp(source: str) -> ctypes.CDLL:
    """A C++ source compiled for this machine with Inductor's compiler and flags, from its cache where it is known."""
    from torch._inductor.codecache import CppCodeCache

    compiled: ctypes.CDLL = CppCodeCache.load(source, **_without_isa())
    return compiled


def find_cpp_flags() -> None:
    """Have Inductor look, where ``compile_cpp`` would, what the C++ compiler can do for this processor.

    It keeps the answer for the process. Two threads that look at once may find different flags, and so other names in
    its cache.
    """
    if not _without_isa():
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        wait(begin_isa_checks())
        pick_vec_isa()


@functools.cache
def _without_isa() -> dict[str, Any]:
    """The argument of 2.13 that spares the look, which takes a second of a warm start; 2.11 has none.

    ``-march=native`` stands among the flags of Linux either way.
    """
    from torch._inductor.codecache import CppCodeCache

    return {"needs_vec_isa": False} if "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters else {}


@functools.cache
def begin_isa_checks() -> list[Future[Any]]:
    """Begin with what Inductor will want to know of this processor; to be waited for before Inductor is called.

    It looks what the compiler can do with each set of instructions, and keeps the answer for the process. In a warm
    start that takes a second, which a thread has time for while the graph passes run; it must have ended before
    Inductor looks, because of two threads that look at once one may find wrong flags. In a cold start a program has to
    be compiled for each set, one after the other, which takes longer than many a graph. Threads compile these as
    Inductor would, which will find them in its cache or wait for their files: nothing has to be waited for here.

    2.11 has the same names.
    """
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    pool = ThreadPoolExecutor(2, "pifa-isa")
    try:
        if any(Path(cache_dir()).glob("*/*.so")):
            return [pool.submit(cpu_vec_isa.valid_vec_isa_list)]
        have = cpu_vec_isa.x86_isa_checker() if config.cpp.vec_isa_ok is None else []
        for isa in cpu_vec_isa.supported_vec_isa_list:
            if all(flag in have for flag in str(isa).split()):  # a new one: Inductor changes its own while it looks
                pool.submit(type(isa)().check_build, cpu_vec_isa.VecISA._avx_code)
        return []
    finally:
        pool.shutdown(wait=False)


@functools.cache
def cpu_instructions() -> frozenset[str]:
    """The sets of instructions of this processor, as Linux names them (``avx512f``); none where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split() if found else ())


def freezing(on: bool) -> AbstractContextManager[Any]:
    """Have Inductor take parameters as constants, and pack them, or not; what is compiled inside is what it says."""
    from torch._inductor import config

    patched: AbstractContextManager[Any] = config.patch(freezing=on)
    return patched


def cache_key_tag(tag: str) -> AbstractContextManager[Any]:
    """Have ``tag`` in the key of both compile caches while the context is entered; a user's own tag stays in it."""
    patched: AbstractContextManager[Any] = torch.compiler.config.patch(cache_key_tag=_with_tag(tag))  # type: ignore[attr-defined]
    return patched


def add_cache_key_tag(tag: str) -> None:
    """Have ``tag`` in the key of both compile caches from now on."""
    torch.compiler.config.cache_key_tag = _with_tag(tag)


def _with_tag(tag: str) -> str:
    present = torch.compiler.config.cache_key_tag
    return present if tag in present else f"{present}{tag}"


def name_lifted_buffer(gm: fx.GraphModule, name: str) -> None:
    """Tell AOTAutograd where a buffer that a pass has added to a Dynamo graph comes from; it refuses unknown ones."""
    from torch._dynamo.source import ConstantSource

    sources: Any = gm._param_name_to_source
    sources[name] = ConstantSource(name)


def inlined_parameters(gm: fx.GraphModule) -> int:
    """How many parameters of two dimensions or more stand in a Dynamo graph as constants, not as inputs.

    So Dynamo hands them over under a global ``torch._inductor.config.freezing`` (with gradients off).
    """
    targets = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    found = {id(p): p for name in targets if isinstance(p := getattr(gm, name, None), torch.nn.Parameter)}
    return sum(p.dim() > 1 for p in found.values())


def placeholder_name(node: fx.Node) -> str:
    """The dotted name that a placeholder's value has in the traced frame, e.g. ``model.layers.0.mlp.up_proj.weight``.

    Names are labels only: after a graph break they lack a prefix.
    """
    source = _source(node)
    if source is None:
        return node.name
    name = source.name() if callable(source.name) else source.name
    return dotted(name)


def dotted(source: str) -> str:
    """``L['self']._modules['layers']._modules['0']._parameters['weight']`` as ``layers.0.weight``."""
    head, _, rest = source.partition("]")
    text = rest if head.startswith(("L[", "G[")) else source
    parts = re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", text)
    words = [indexed or attribute for indexed, attribute in parts]
    return ".".join(w for w in words if w not in ("_modules", "_parameters", "_buffers")) or text


def is_of_module(placeholder: fx.Node) -> bool:
    """Whether a placeholder's value is a parameter or buffer of a module, not an input of the call."""
    source = _source(placeholder)
    if source is None:
        return False
    name = source.name() if callable(source.name) else source.name
    return "._parameters[" in name or "._buffers[" in name


def gathered_by_fsdp(placeholder: fx.Node) -> bool:
    """Whether a placeholder's value belongs to a module that FSDP shards, and is put together for each call."""
    from torch._dynamo.source import FSDPNNModuleSource

    source = _source(placeholder)
    while source is not None and not isinstance(source, FSDPNNModuleSource):
        source = getattr(source, "base", None)
    return source is not None


def innermost_module(node: fx.Node) -> str:
    """The class name of the module whose forward made the node; empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    _, kind = list(stack.values())[-1]
    return kind.rsplit(".", 1)[-1] if isinstance(kind, str) else str(kind.__name__)


def compile_id() -> str:
    """The number of the graph being compiled, as torch's own logs print it (``frame/recompile``), e.g. ``0_0``."""
    from torch._guards import CompileContext

    found = CompileContext.current_compile_id()
    return "manual" if found is None else f"{found.frame_id}_{found.frame_compile_id}"


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Put an artifact into torch's structured trace (TORCH_TRACE, tlparse); ``payload`` is called only if it is on."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def linear_function() -> Callable[..., Tensor]:
    """The function that ``torch.nn.functional.linear`` is in a Dynamo graph."""
    return torch._C._nn.linear


def transforms_functions(graph: fx.Graph) -> bool:
    """Whether a Dynamo graph has torch.func (vmap, grad, ...) in it, or regions with gradients of their own."""
    names = (getattr(node.target, "__name__", "") for node in graph.nodes)
    return any(name.endswith("_increment_nesting") or name == "_set_grad_enabled" for name in names)


def grad_mode_functions() -> tuple[Callable[..., Any], ...]:
    """The functions by which a Dynamo graph turns gradients and inference mode on and off."""
    from torch.autograd import grad_mode

    return (torch._C._set_grad_enabled, grad_mode._enter_inference_mode, grad_mode._exit_inference_mode)


def size_hint(size: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The number that a symbolic size stands for in the present call; asking for it adds no guard."""
    return size.node.hint


def unchecked_index() -> Callable[..., Tensor]:
    """``x[index]`` without a check of its bounds; the index is a list of tensors and None, one per dimension."""
    return torch.ops.aten._unsafe_index.Tensor


def grouped_products() -> tuple[Callable[..., Any], ...]:
    """The functions that multiply groups of tokens with stacks of weights (experts), as Dynamo graphs show them."""
    candidates = (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None))
    return tuple(function for function in candidates if function is not None)


def quantized_products() -> tuple[Callable[..., Any], ...]:
    """The functions that multiply with a weight of 8 bits whose scales stand apart, as Dynamo graphs show them."""
    names = ("_int_mm", "_scaled_mm", "_scaled_mm_v2", "_weight_int8pack_mm")
    return tuple(function for name in names if (function := getattr(torch, name, None)) is not None)


def operator_name(target: Any) -> str | None:
    """``namespace.name`` of a registered operator, such as ``transformers.grouped_mm_fallback``; None for others."""
    registered = isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    return str(target).removesuffix(".default") if registered else None


def in_function_transform() -> bool:
    """Whether the code runs inside of a transform of torch.func (vmap, grad ...)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def exporting() -> bool:
    """Whether the code is traced by torch.export; Dynamo of torch 2.11 takes its own question for True at all times."""
    return torch.compiler.is_exporting()


# Dynamo asks while it traces, and guards the answer by itself. As torch.compiler.assume_constant_result marks it, which
# imports all of Dynamo.
for _asked in (in_function_transform, exporting):
    setattr(_asked, "_dynamo_marked_constant", True)  # noqa: B010


def autocast_is_on() -> bool:
    """Whether autocast is on for any kind of device that this build of torch has."""
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def autocast_begins(node: fx.Node) -> bool:
    """Whether a node of a Dynamo graph turns autocast on (or, as well, off)."""
    return node.target is torch.amp.autocast_mode._enter_autocast


def attention_fast_path() -> tuple[Callable[..., Any], ...]:
    """What nn.MultiheadAttention is in a graph where torch takes its fast path."""
    return tuple(f for f in [getattr(torch, "_native_multi_head_attention", None)] if f is not None)


def encoder_layer_fast_path() -> tuple[Callable[..., Any], ...]:
    """What nn.TransformerEncoderLayer is in a graph where torch takes its fast path."""
    return tuple(f for f in [getattr(torch, "_transformer_encoder_layer_fwd", None)] if f is not None)


def without_overrides(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.nn.functional that goes into its own body although a TorchFunctionMode is active."""
    source: Any = function
    names = source.__globals__ | {"has_torch_function": lambda _: False}
    made = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__, source.__closure__)
    made.__kwdefaults__ = source.__kwdefaults__
    return made


@contextmanager
def fake_mode_of(values: Iterable[Any]) -> Iterator[None]:
    """The mode of the first fake tensor, as Dynamo runs it: tensors that are made inside are fake too, and sizes stay
    symbols (without the Python dispatcher torch 2.11 turns those of ``linear`` into numbers)."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensor

    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), nullcontext())
    with mode, enable_python_dispatcher():
        yield


def size_expression(size: torch.SymInt) -> Any:
    """A symbolic size as a sympy expression."""
    return size.node.expr


def tensor_without_memory(kind: type[Any], shape: tuple[int, ...], like: Tensor) -> Any:
    """A tensor of the subclass ``kind`` that has a shape, and dtype and device of ``like``, but no content."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, dtype=like.dtype, device=like.device)


def as_plain_tensor(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` as if the tensors among its arguments were of no subclass."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def own_frame(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``model``, with a code object of its own.

    Dynamo keeps compiled code, and its limit of recompilations, by code object: two variants of one model compiled
    through functions of their own do not count against each other.
    """

    def forward(*args: Any, **keywords: Any) -> Any:
        return model(*args, **keywords)

    code = forward.__code__.replace(co_name=f"forward_{next(_FRAMES)}")
    return types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)


_FRAMES = itertools.count()


def fake_value(node: fx.Node) -> Any:
    """What Dynamo knows of a node's value: a fake tensor with its shape, dtype and device, or None."""
    return node.meta.get("example_value")


class InductorLowering:
    """Inductor's lowering interface: the IR, its operations, and its own lowerings of aten operators."""

    def __init__(self) -> None:
        from torch._inductor import ir, lowering
        from torch._inductor.virtualized import ops

        self.ir: Any = ir
        self.ops: Any = ops
        self._lowering: Any = lowering

    def register(self, op: Any, function: Callable[..., Any]) -> None:
        """Make a function of Inductor IR the lowering of ``op``; it takes care of dtypes itself."""
        self._lowering.register_lowering(op, type_promotion_kind=None)(function)

    def call(self, op: Any, *args: Any, **settings: Any) -> Any:
        """Inductor's own lowering of an aten operator, on IR."""
        return self._lowering.lowerings[op](*args, **settings)

    def to_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """IR of x in another dtype."""
        return self._lowering.to_dtype(x, dtype)

    def iota(self, length: Any, device: torch.device) -> Any:
        """IR of 0, 1, ... length - 1 in int64."""
        settings = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
        return self._lowering.lowerings[torch.ops.prims.iota](length, **settings)


def untraced() -> AbstractContextManager[object]:
    """Inside, tensors are real also where somebody traces: modules are imported, and may make some."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


@functools.cache
def inductor() -> InductorLowering:
    """The lowering interface, imported on first use: that takes two seconds."""
    return InductorLowering()


class InductorAutotuner:
    """Inductor's Triton templates and its choice among them (read and run with 2.13 and 2.11)."""

    def __init__(self) -> None:
        from torch._inductor import config, ir, select_algorithm
        from torch._inductor.virtualized import V

        self._config, self._ir, self._select, self._virtual = config, ir, select_algorithm, V

    def template(self, name: str, grid: Callable[..., Any], source: str) -> Any:
        """A Triton template; ``grid(*output_sizes, constants, cdiv=)`` gives the launch grid, of ints or symbols.

        Names are global and may be taken once per process: where this package is loaded again, the first one stays.
        """
        made = self._select.TritonTemplate.all_templates.get(name)
        if made is None:
            made = self._select.TritonTemplate(name, self._select.SymbolicGridFn(grid), source)
        return made

    def kernel(self, name: str, function: Callable[..., Tensor]) -> Any:
        """A Python function of tensors that compiled code may call; its name is global too."""
        found = self._select.ExternKernelChoice.lookup(name) if self._has_lookup() else None
        if found is None and not hasattr(self._select.extern_kernels, name):
            found = self._select.ExternKernelChoice(function, name=name, has_out_variant=False)
            _KERNELS[name] = found
        return found or _KERNELS[name]

    def _has_lookup(self) -> bool:
        return hasattr(self._select.ExternKernelChoice, "lookup")  # 2.13

    def layout(self, like: Any, size: list[Any], dtype: torch.dtype) -> Any:
        """A contiguous matrix on the device of the IR ``like``."""
        return self._ir.FixedLayout(like.get_device(), dtype, size, [size[1], 1])

    def realize(self, *inputs: Any) -> list[Any]:
        """The inputs as buffers in memory."""
        return [self._select.realize_inputs(x) for x in inputs]

    def add(
        self,
        choices: list[Any],
        template: Any,
        inputs: list[Any],
        layout: Any,
        *,
        early: Sequence[Any] | None = None,
        **settings: Any,
    ) -> str | None:
        """Render a template and append it to the choices; returns what was wrong where it cannot be rendered.

        early  launch it while the kernel ahead of it still runs; these inputs it may read before it waits for that one
        """
        if early is not None:
            if not self.launches_early():
                return "this torch has no way to launch a template early"
            if not all(map(self._is_given, early)):
                return "the kernel ahead may still write what this one would read early"
            settings["triton_meta"] = {"launch_pdl": True}
        problem = template.maybe_append_choice(choices, input_nodes=tuple(inputs), layout=layout, **settings)
        return None if problem is None else str(problem)

    def launches_early(self) -> bool:
        """Whether a template can be launched while the kernel ahead of it still runs."""
        return "triton_meta" in inspect.signature(self._select.TritonTemplate.generate).parameters

    def add_kernel(self, choices: list[Any], kernel: Any, inputs: list[Any], layout: Any, **arguments: Any) -> None:
        """Append a call of a Python function to the choices."""
        choices.append(kernel.bind(tuple(inputs), layout, **arguments))

    def choose(self, name: str, choices: list[Any], inputs: list[Any], layout: Any, make: dict[int, Any]) -> Any:
        """IR of the best choice; one alone is not measured. ``make`` fills inputs by position for the measurement."""
        found = self._select.autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=make)
        return found[0] if isinstance(found, tuple) else found  # 2.13 returns the choice as well

    def measures(self) -> bool:
        """Whether choices are to be measured (max_autotune)."""
        return bool(self._config.max_autotune or self._config.max_autotune_gemm)

    def calls_python(self) -> bool:
        """Whether the generated program can call Python functions: not where it is C++ (AOTInductor)."""
        return not self._virtual.graph.cpp_wrapper

    def expected(self, size: Any) -> int:
        """The value of a size, for a symbol the one that it was first seen with."""
        return int(self._virtual.graph.sizevars.optimization_hint(size))

    def _is_given(self, ir: Any) -> bool:
        """Whether IR is memory that was there before the program began, or a view of it."""
        graph = self._virtual.graph
        return ir.get_name() in graph.graph_inputs or ir.get_name() in graph.constants

    def is_number(self, size: Any) -> bool:
        """Whether a size is a number, not a symbol."""
        return isinstance(size, int) or bool(size.is_number)

    def workspace(self, device: torch.device, count: Any, dtype: torch.dtype) -> Any:
        """Uninitialised memory of ``count`` numbers that a template finds at ``ws_ptr`` while it runs."""
        from torch._inductor.codegen.common import WorkspaceArg, WorkspaceZeroMode

        return WorkspaceArg(
            count=count,
            zero_mode=WorkspaceZeroMode.UNINITIALIZED,
            device=device,
            outer_name=WorkspaceArg.unique_name(),
            dtype=dtype,
        )

    def once_per_graph(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for the graph that is being lowered."""
        made: dict[str, Any] = self._virtual.graph.__dict__.setdefault("pifa_once", {})
        if name not in made:
            made[name] = make()
        return made[name]

    def numbers(self, ir: Any) -> Tensor:
        """Uninitialised memory for a benchmark of IR: for functions that fill it."""
        size = [self.expected(s) for s in ir.get_size()]
        return torch.empty(size, dtype=ir.get_dtype(), device=ir.get_device())


_KERNELS: dict[str, Any] = {}


@functools.cache
def autotuner() -> InductorAutotuner:
    """The autotuning interface, imported on first use."""
    return InductorAutotuner()


def tf32_allowed() -> bool:
    """Whether float32 matrix products may round their inputs to TF32 on CUDA."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def device_name(device: torch.device) -> str:
    """What the driver calls a CUDA device."""
    return torch.cuda.get_device_name(device)


def processors(device: torch.device) -> int:
    """How many streaming multiprocessors a CUDA device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tracing() -> bool:
    """Whether a structured trace is being written (TORCH_TRACE)."""
    from torch._logging._internal import trace_log

    return bool(trace_log.handlers)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as an attribute of torch: ``float32``."""
    return str(dtype).removeprefix("torch.")


def guard_identity(placeholder: fx.Node) -> None:
    """Have Dynamo recompile when the placeholder's value is another object; only while Dynamo is compiling."""
    from torch._dynamo.guards import GuardBuilder

    _add_guard(placeholder, GuardBuilder.ID_MATCH)


def guard_owner(placeholder: fx.Node) -> None:
    """Tie the compiled code to the local variable that the placeholder's value is found through, if it is a module.

    Dynamo then counts recompilations per module. Without that, blocks that share one forward function (regional
    compilation, graph breaks) count against one limit, and past eight of them the rest would run dense.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import LocalSource

    source = _source(placeholder)
    while source is not None and hasattr(source, "base"):
        source = source.base
    if isinstance(source, LocalSource):
        _add_guard_to(source, GuardBuilder.ID_MATCH)


def guard_condition(placeholder: fx.Node, holds: Callable[[], bool]) -> None:
    """Have Dynamo recompile when ``holds()`` is False; it is asked before every call of the compiled frame."""

    def create(builder: Any, guard: Any) -> None:
        add = builder.guard_manager.root.add_lambda_guard
        words = ["pifa: the weights are those that were compiled"]
        try:
            add(lambda _: holds(), words, None)
        except TypeError:  # torch 2.11 takes no user stack
            add(lambda _: holds(), words)

    _add_guard(placeholder, create)


def _add_guard(placeholder: fx.Node, create: Callable[..., None]) -> None:
    source = _source(placeholder)
    if source is not None:
        _add_guard_to(source, create)


def _source(placeholder: fx.Node) -> Any:
    return getattr(placeholder, "_dynamo_source", None) or getattr(placeholder.meta.get("grapharg"), "source", None)


def _add_guard_to(source: Any, create: Callable[..., None]) -> None:
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is not None:
        context.guards_context.dynamo_guards.add(source.make_guard(create))
