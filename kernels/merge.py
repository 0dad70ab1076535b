"""On CPU, the two parts of an output put in order: ``pifa::merge``, by ``cpu/merge.cpp``.

    pifa::merge(y_p, y_np, blocks) -> y

m = out_features, r = rank, N = number of tokens (all leading dimensions together); y_p is N x r, y_np N x (m-r). Both
parts must keep their order in y: ``blocks_of`` says whether they do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from pifa_compile import _torch
from pifa_compile.kernels import native

SCHEMA = "(Tensor y_p, Tensor y_np, Tensor blocks) -> Tensor"
BLOCK = 32  # features

#: What the kernel needs for numbers of so many bytes, as Linux names it.
INSTRUCTIONS = {2: "avx512_vbmi2", 4: "avx512f"}


def available(dtype: torch.dtype) -> bool:
    """Whether this processor has the instructions for numbers of this size. Has the kernel compiled meanwhile."""
    needed = INSTRUCTIONS.get(dtype.itemsize)
    found = needed is not None and needed in _torch.cpu_instructions()
    if found:
        native.begin("merge")
    return found


def blocks_of(positions: Tensor, r: int) -> Tensor | None:
    """What the operator needs to know of an order, (blocks of 32 features, 2) in int32; None for other orders.

    positions  m, a permutation: feature j of y is at place positions[j] of [y_p, y_np]
    """
    pivots = positions < r
    if any(bool((part[1:] < part[:-1]).any()) for part in (positions[pivots], positions[~pivots])):
        return None
    m = positions.shape[0]
    padded = torch.zeros(-(-m // BLOCK) * BLOCK, dtype=torch.int64)
    padded[:m] = pivots.cpu()
    features = padded.view(-1, BLOCK)
    words = (features << torch.arange(BLOCK)).sum(1)
    counts = features.sum(1)
    return torch.stack([(words ^ (1 << 31)) - (1 << 31), counts.cumsum(0) - counts], 1).to(torch.int32)  # as signed


@functools.cache
def _kernel(size: int) -> Callable[..., None] | None:
    return native.function(native.library("merge"), f"merge{8 * size}", (c_void_p,) * 4 + (c_long,) * 5)


def _merge(y_p: Tensor, y_np: Tensor, blocks: Tensor) -> Tensor:
    lead, r, others = y_p.shape[:-1], y_p.shape[-1], y_np.shape[-1]
    m = r + others
    if y_p.dtype != y_np.dtype or lead != y_np.shape[:-1] or blocks.shape != (-(-m // BLOCK), 2):
        raise RuntimeError(
            f"pifa::merge: parts {tuple(y_p.shape)} of {y_p.dtype} and {tuple(y_np.shape)} of {y_np.dtype} and "
            f"{blocks.shape[0]} blocks do not fit each other"
        )
    kernel = _kernel(y_p.element_size())
    if kernel is None:
        return _gathered(y_p, y_np, blocks)
    first, second = _as_rows(y_p), _as_rows(y_np)
    y = y_p.new_empty((*lead, m))
    kernel(
        first.data_ptr(), second.data_ptr(), blocks.data_ptr(), y.data_ptr(),
        first.shape[0], m, first.stride(0), second.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _gathered(y_p: Tensor, y_np: Tensor, blocks: Tensor) -> Tensor:
    """The same without the kernel: slower, for numbers or compilers that it cannot be had for."""
    r, m = y_p.shape[-1], y_p.shape[-1] + y_np.shape[-1]
    pivots = ((blocks[:, :1].to(torch.int64) >> torch.arange(BLOCK)) & 1).flatten()[:m].bool()
    places = torch.where(pivots, pivots.cumsum(0) - 1, r + (~pivots).cumsum(0) - 1)
    return torch.cat([y_p, y_np], -1).index_select(-1, places)


def _as_rows(part: Tensor) -> Tensor:
    """N x features with features side by side; the slice of a matrix stays one."""
    rows = part if part.dim() == 2 else part.flatten(0, -2) if part.dim() > 2 else part[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _fake(y_p: Tensor, y_np: Tensor, blocks: Tensor) -> Tensor:
    return y_p.new_empty((*y_p.shape[:-1], y_p.shape[-1] + y_np.shape[-1]))


merge: Any = native.define("merge", SCHEMA, _merge, _fake)
