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

    numbers  how many numbers x may have against packed weights: more do not stay in the nearest cache
    """

    plain: int
    packed: int
    numbers: int | None = None


# Measured, see cpu/few_tokens.cpp: with which instructions a library multiplies decides how long it stays behind.
_AMX = {torch.float32: Most(16, 4), torch.bfloat16: Most(3, 3), torch.float16: Most(8, 4)}
_WIDE = {torch.float32: Most(96, 96), torch.bfloat16: Most(96, 32, 1 << 15), torch.float16: Most(512, 512)}
_NARROW = {torch.float32: Most(8, 4), torch.bfloat16: Most(2, 2), torch.float16: Most(2, 2)}


def serves(tokens: int, inputs: int, dtype: torch.dtype, *, packed: bool = False) -> bool:
    """Whether this is the fastest form for so many tokens and inputs on this processor; ``packed``: if weights are.

    If so, has the kernel compiled meanwhile.
    """
    found = 1 <= tokens <= most_tokens(dtype, inputs, packed=packed)
    if found:
        native.begin("few_tokens", KINDS[dtype])
    return found


def most_tokens(dtype: torch.dtype, inputs: int = 1, *, packed: bool = False) -> int:
    """For how many tokens at most this is the fastest form on this processor; 0 where it cannot be had."""
    have = _torch.cpu_instructions()
    if dtype not in KINDS or (dtype == torch.float16 and not have & {"avx512f", "f16c"}):
        return 0
    wide = "avx512f" in have and (dtype != torch.bfloat16 or "avx512_bf16" in have)
    most = (_AMX if "amx_bf16" in have else _WIDE if wide else _NARROW)[dtype]
    if not packed:
        return most.plain
    return most.packed if most.numbers is None else min(most.packed, most.numbers // inputs)


@functools.cache
def _kernel(dtype: torch.dtype) -> Callable[..., int] | None:
    compiled = native.library("few_tokens", KINDS[dtype]) if most_tokens(dtype) else None
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
