"""On CPU, a factored layer on few tokens in one call: ``pifa::few_tokens``, by ``cpu/few_tokens.cpp``.

    pifa::few_tokens(x, pivot_rows, coefficients, row_order, bias=None) -> y

What ``pifa::linear`` computes of tensors of one dtype, without gradients. The graph passes put it where it is faster.
m = out_features, n = in_features, r = rank, N = number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int, c_long, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pifa_compile import _torch
from pifa_compile.kernels import native, op

KINDS = {torch.float32: "Float32", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}  # in cpu/numbers.h
SCHEMA = "(Tensor x, Tensor pivot_rows, Tensor coefficients, Tensor row_order, Tensor? bias=None) -> Tensor"


@dataclass(frozen=True)
class Most:
    """Up to how many tokens this is the fastest form, against weights as they are and packed.

    cached   the same of a layer that caches hold; a token more takes PER_TOKEN more numbers of weights. None: as many
    numbers  how many numbers x may have against packed weights: more do not stay in the nearest cache
    """

    plain: int
    packed: int
    cached: int | None = None
    numbers: int | None = None


#: Numbers of weights that have to come from memory to pay for a token's products, which a library does faster.
PER_TOKEN = 1 << 14

# Measured, see cpu/few_tokens.cpp: with which instructions a library multiplies decides how long it stays behind.
_AMX = {torch.float32: Most(16, 4), torch.bfloat16: Most(3, 3), torch.float16: Most(8, 4)}
_WIDE = {
    torch.float32: Most(96, 96, cached=16),
    torch.bfloat16: Most(96, 32, numbers=1 << 15),
    torch.float16: Most(512, 512),
}
_NARROW = {torch.float32: Most(8, 4), torch.bfloat16: Most(2, 2), torch.float16: Most(2, 2)}


def serves(tokens: int, m: int, n: int, r: int, dtype: torch.dtype, *, packed: bool = False) -> bool:
    """Whether this is the fastest form of a layer for so many tokens on this processor; ``packed``: if weights are.

    If so, has the kernel compiled meanwhile.
    """
    found = 1 <= tokens <= most_tokens(m, n, r, dtype, packed=packed)
    if found:
        native.begin("few_tokens", KINDS[dtype])
    return found


def most_tokens(m: int, n: int, r: int, dtype: torch.dtype, *, packed: bool = False) -> int:
    """For how many tokens at most this is the fastest form on this processor; 0 where it cannot be had."""
    if not available(dtype):
        return 0
    have = _torch.cpu_instructions()
    wide = "avx512f" in have and (dtype != torch.bfloat16 or "avx512_bf16" in have)
    most = (_AMX if "amx_bf16" in have else _WIDE if wide else _NARROW)[dtype]
    found = most.packed if packed else most.plain
    if most.cached is not None:
        found = min(found, max(most.cached, r * (m + n - r) // PER_TOKEN))
    return min(found, most.numbers // n) if packed and most.numbers is not None else found


def available(dtype: torch.dtype) -> bool:
    """Whether this processor can have the kernel for numbers of a dtype."""
    return dtype in KINDS and (dtype != torch.float16 or bool(_torch.cpu_instructions() & {"avx512f", "f16c"}))


@functools.cache
def _kernel(dtype: torch.dtype) -> Callable[..., int] | None:
    compiled = native.library("few_tokens", KINDS[dtype]) if available(dtype) else None
    return native.function(compiled, "factored_layer", (c_void_p,) * 6 + (c_long,) * 5, c_int)


def _few_tokens(
    x: Tensor, pivot_rows: Tensor, coefficients: Tensor, row_order: Tensor, bias: Tensor | None = None
) -> Tensor:
    # Python is a twentieth of a layer's time here: no checks with closures, no calls that change nothing.
    (r, n), m, dtype = pivot_rows.shape, row_order.shape[0], x.dtype
    if x.shape[-1] != n or coefficients.shape != (m - r, r) or not (bias is None or bias.shape == (m,)):
        raise RuntimeError(
            f"pifa::few_tokens: x {tuple(x.shape)}, pivot rows {tuple(pivot_rows.shape)}, "
            f"coefficients {tuple(coefficients.shape)} and {m} rows do not fit each other"
        )
    alike = pivot_rows.dtype == coefficients.dtype == dtype and (bias is None or bias.dtype == dtype)
    if not alike or row_order.dtype != torch.int32:
        raise RuntimeError(
            "pifa::few_tokens: x, pivot rows, coefficients and bias must have one dtype, the row order int32"
        )
    kernel = _kernel(dtype)
    if kernel is None:  # no compiler, or a processor without such numbers
        return op.reference(x, pivot_rows, coefficients, row_order, bias)
    held = [t.contiguous() for t in (x, pivot_rows, coefficients, row_order)]
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((*x.shape[:-1], m))
    failed = kernel(
        *[t.data_ptr() for t in held], None if bias is None else bias.data_ptr(), y.data_ptr(),
        x.numel() // n, m, n, r, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise IndexError(f"pifa::few_tokens: the row order has entries that are not in 0 to {m - 1}")
    return y


def _fake(x: Tensor, pivot_rows: Tensor, coefficients: Tensor, row_order: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_order.shape[0]))


few_tokens: Any = native.define("few_tokens", SCHEMA, _few_tokens, _fake)
