"""A whole block, and a whole model of Llama-2-7B's shape: dense, at two densities, and at half the rank as a pair and
as PIFA, all compiled alike and captured in CUDA graphs. Tokens per second, bytes of weights, and the peak of memory."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu import layers
from bench.gpu.cases import relative
from bench.gpu.llama import LLAMA_2_7B, TINY, Block, Model, Weights
from bench.gpu.timing import inductor, seconds_per_call
from pifa_compile.backend import pifa
from pifa_compile.kernels import kernel_forms
from pifa_compile.kernels.tile_tables import EARLY, table_for

Row = dict[str, Any]
DENSE, SMALLEST = Weights(), Weights("pifa", 0.55)
WEIGHTS = (DENSE, SMALLEST, Weights("pifa", 0.5625), Weights("pair"), Weights("pifa"))
CACHE = 512  # tokens that a decoding step attends to
#: The backend itself, as users call it; a rehearsal on the CPU stops before C++ is compiled.
OURS = {"cuda": pifa, "cpu": functools.partial(pifa, options={"inner": "eager"})}


def _backend(weights: Weights, device: str) -> Any:
    return OURS[device] if weights.form == "pifa" else inductor(device)


def model_rows(weights: Weights, batches: tuple[int, ...], prefill: int, device: str, tiny: bool) -> list[Row]:
    """Decoding at each batch size, and a prefill, of one model; it is built once for each."""
    shape, dtype = (TINY, torch.float32) if tiny else (LLAMA_2_7B, torch.bfloat16)
    found = []
    for batch, tokens in [*((batch, 1) for batch in batches), (1, prefill)]:
        about = {"model": shape.name, "way": str(weights), "batch": batch, "tokens": tokens}
        row: Row = about | {"dtype": str(dtype)[6:]}
        try:
            found.append(row | _measure(shape, weights, batch, tokens, dtype, device))
        except Exception as problem:  # a row that fails must not end the run, nor be hidden
            found.append(row | layers.failure(problem, device))
        _forget(device)
    return found


def _measure(shape: Any, weights: Weights, batch: int, tokens: int, dtype: torch.dtype, device: str) -> Row:
    _forget(device)
    with torch.device(device), torch.no_grad():
        model = Model(shape, max(CACHE if shape is not TINY else 32, tokens), batch, weights, dtype, device).eval()
        words = torch.randint(shape.vocabulary, (batch, tokens))
        position = torch.arange(tokens) + (0 if tokens > 1 else model.tokens - 1)
        expected = model(words, position)
        model.compile_blocks(_backend(weights, device))
        error = relative(model(words, position), expected)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of running it, not of making and compiling it
        seconds = seconds_per_call([functools.partial(model, words, position)], device)
        error = max(error, relative(seconds.output, expected))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "ms": seconds.median * 1e3,
        "tokens per s": batch * tokens / seconds.median,
        "linear GB": model.linear_bytes() / 1e9,
        "weights GB": sum(p.nbytes for p in model.parameters()) / 1e9,
        "peak GB": peak / 1e9,
        "error": error,  # against the same model without compilation
        "ok": error < (5e-2 if dtype == torch.bfloat16 else 1e-4),
    }


def block_rows(tokens: int, device: str, tiny: bool) -> list[Row]:
    """One block with each kind of weights; the smallest also in one form each, and without early tiles if the table in
    force has tried them. With 16 tokens and fewer, layers that read the same ones keep their own form."""
    shape, dtype = (TINY, torch.float32) if tiny else (LLAMA_2_7B, torch.bfloat16)
    ways = [_Block(str(weights), weights) for weights in WEIGHTS]
    for form in kernel_forms.available(torch.device(device), dtype, tokens):
        ways.append(_Block(f"{SMALLEST}, {form}", SMALLEST, functools.partial(layers.forced, device, form), form))
    if device == "cuda" and EARLY not in table_for(torch.cuda.get_device_name()).untried:
        ways.append(_Block(f"{SMALLEST}, none early", SMALLEST, functools.partial(layers.all_templates, device)))
    found = []
    for way in ways:
        about = {"model": f"{shape.name} block", "way": way.name, "tokens": tokens, "dtype": str(dtype)[6:]}
        row: Row = about | ({"form": way.form} if way.form else {})
        try:
            found.append(row | _measure_block(way, shape, tokens, dtype, device))
        except Exception as problem:  # as above
            found.append(row | layers.failure(problem, device))
    _forget(device)
    return found


@dataclass(frozen=True)
class _Block:
    """A way to run a block; ``context`` has the table that it runs with."""

    name: str
    weights: Weights
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    form: str | None = None


def _measure_block(way: _Block, shape: Any, tokens: int, dtype: torch.dtype, device: str) -> Row:
    torch.compiler.reset()
    with torch.device(device), torch.no_grad(), way.context():
        block = Block(shape, tokens, 1, way.weights, dtype, device).eval()  # its weights are more than any cache holds
        x = torch.randn(1, tokens, shape.width).to(dtype)
        cos, sin = (torch.randn(tokens, shape.width // shape.heads).to(dtype) for _ in range(2))
        given = (x, cos, sin, torch.arange(tokens), None)
        expected = block(*given)
        compiled = torch.compile(block, backend=_backend(way.weights, device), dynamic=False)
        error = relative(compiled(*given), expected)
        seconds = seconds_per_call([functools.partial(compiled, *given)], device)
        error = max(error, relative(seconds.output, expected))
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    return {"ms": seconds.median * 1e3, "error": error, "ok": error < bound}


def _forget(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
