"""On CPU, a factored layer on few tokens in one call: ``pifa::few_tokens``, by ``cpu/few_tokens.cpp``.

    pifa::few_tokens(x, pivot_rows, coefficients, row_order, bias=None) -> y

What ``pifa::linear`` computes of tensors of one dtype, without gradients. The graph passes put it where it is faster.
m = out_features, n = in_features, r = rank, N = number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from pifa_compile.kernels import native

KINDS = {torch.float32: "Float32", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}  # in cpu/numbers.h
SCHEMA = "(Tensor x, Tensor pivot_rows, Tensor coefficients, Tensor row_order, Tensor? bias=None) -> Tensor"


#: More than that it serves nowhere, so that nothing need be compiled to know. Where Inductor packs the weights for its
#: library (``freezing``) that is faster earlier: 16 tokens, float32, as in cpu/few_tokens.cpp, 1.4 ms against 1.8.
LIMIT, LIMIT_PACKED = 16, 4


def serves(tokens: int, dtype: torch.dtype, *, packed: bool = False) -> bool:
    """Whether this is the fastest form for so many tokens on this processor; ``packed``: against packed weights."""
    return 0 < tokens <= (LIMIT_PACKED if packed else LIMIT) and tokens <= most_tokens(dtype)


@functools.cache
def most_tokens(dtype: torch.dtype) -> int:
    """For how many tokens at most this is the fastest form; 0 where it cannot be had. Compiles it."""
    if dtype not in KINDS:
        return 0
    most = native.function(native.library("few_tokens", KINDS[dtype]), "most_tokens", (), c_long)
    return 0 if most is None else int(most())


@functools.cache
def _kernel(dtype: torch.dtype) -> Callable[..., int]:
    compiled = native.library("few_tokens", KINDS[dtype]) if most_tokens(dtype) else None
    found = native.function(compiled, "factored_layer", (c_void_p,) * 6 + (c_long,) * 5, c_int)
    if found is None:
        raise RuntimeError(f"pifa::few_tokens cannot be had for {dtype} on this processor; use pifa::linear")
    return found


def _few_tokens(
    x: Tensor, pivot_rows: Tensor, coefficients: Tensor, row_order: Tensor, bias: Tensor | None = None
) -> Tensor:
    (r, n), m = pivot_rows.shape, row_order.shape[0]
    given = (pivot_rows, coefficients) if bias is None else (pivot_rows, coefficients, bias)
    torch._check(
        x.shape[-1] == n and coefficients.shape == (m - r, r) and (bias is None or bias.shape == (m,)),
        lambda: f"pifa::few_tokens: x {tuple(x.shape)}, pivot rows {tuple(pivot_rows.shape)}, "
        f"coefficients {tuple(coefficients.shape)} and {m} rows do not fit each other",
    )
    torch._check(
        all(t.dtype == x.dtype for t in given) and row_order.dtype == torch.int32,
        lambda: "pifa::few_tokens: x, pivot rows, coefficients and bias must have one dtype, the row order int32",
    )
    held = [t.contiguous() for t in (x, pivot_rows, coefficients, row_order)]
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((*x.shape[:-1], m))
    failed = _kernel(x.dtype)(
        *(t.data_ptr() for t in held), None if bias is None else bias.data_ptr(), y.data_ptr(),
        x.numel() // n, m, n, r, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise IndexError(f"pifa::few_tokens: the row order has entries that are not in 0 to {m - 1}")
    return y


def _fake(x: Tensor, pivot_rows: Tensor, coefficients: Tensor, row_order: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_order.shape[0]))


few_tokens: Any = native.define("few_tokens", SCHEMA, _few_tokens, _fake)
