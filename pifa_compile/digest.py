"""Content digests of tensors: how the store recognises a weight, whatever its name is.

A digest covers the dtype, the shape and every byte of the row-major content. It is a tree hash of two levels: sha256
over a header and the sha256 of chunks of ``CHUNK`` elements. So all cores hash one tensor, and the casts of a tensor
are digested without ever holding one in full. Values that compare equal but differ in bits (0.0 and -0.0) differ here.

Two hardware threads of a Xeon with SHA instructions digest 3 GB/s of weight; with the casts, which are eight bytes to
hash for every number, 1.4 GB/s of fp32 and 0.7 GB/s of bf16 weight.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements of one leaf of the tree; part of what a digest is, never to be changed
CASTS = (torch.float32, torch.bfloat16, torch.float16)
# Torch converts up to this many elements without starting OpenMP threads (at::internal::GRAIN_SIZE). More would give
# each of our threads a team of its own.
_SERIAL = 1 << 15
_PIECE = 1 << 18  # elements that are copied and converted, then hashed: their fp32 form stays in the L2 cache


def digest(t: Tensor) -> str:
    """The digest of ``t``: "sha256:" and 64 hex digits. A non-contiguous tensor has the digest of its contiguous copy.

    Raises TypeError for a tensor without plain content (meta, fake, sparse, quantized, wrapper subclasses).
    """
    return digest_many([t])[0]


def digest_many(tensors: Sequence[Tensor]) -> list[str]:
    """``digest`` of each tensor, with one thread pool for all."""
    return [digests[t.dtype] for t, digests in zip(tensors, _trees(tensors, ()), strict=True)]


def cast_digests(t: Tensor) -> dict[str, str]:
    """The digests of ``t`` and of its casts: {"float32": digest(t.to(torch.float32)), "bfloat16": ..., "float16": ...}.

    The dtype of ``t`` has its entry too when it is none of the three.
    """
    return {_name(dtype): found for dtype, found in _trees([t], CASTS)[0].items()}


def _trees(tensors: Sequence[Tensor], casts: Sequence[torch.dtype]) -> list[dict[torch.dtype, str]]:
    """Per tensor, the digest in its own dtype and in each of ``casts``."""
    plain = [_plain(t) for t in tensors]
    dtypes = [tuple(dict.fromkeys((t.dtype, *casts))) for t in plain]
    jobs = [(i, start) for i, t in enumerate(plain) for start in range(0, t.numel(), CHUNK)]
    roots = [[_root(dtype, t) for dtype in wanted] for t, wanted in zip(plain, dtypes, strict=True)]
    leaves = _map(lambda job: _leaves(plain[job[0]], job[1], dtypes[job[0]]), jobs)
    for (i, _), chunk in zip(jobs, leaves, strict=True):
        for root, leaf in zip(roots[i], chunk, strict=True):
            root.update(leaf)
    return [
        {dtype: f"sha256:{root.hexdigest()}" for dtype, root in zip(wanted, row, strict=True)}
        for wanted, row in zip(dtypes, roots, strict=True)
    ]


def _map(work: Callable[[tuple[int, int]], list[bytes]], jobs: Sequence[tuple[int, int]]) -> Iterator[list[bytes]]:
    """``map`` on one thread per core: hashing, converting and copying all let go of the interpreter lock."""
    threads = min(_cores(), len(jobs))
    if threads <= 1:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="pifa-digest") as pool:
        yield from pool.map(work, jobs)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; a container often has fewer cores than the machine
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _plain(t: Tensor) -> Tensor:
    """``t`` as a strided tensor that threads can read, or TypeError."""
    plain = t.detach()
    if type(plain) is not Tensor or plain.layout is not torch.strided or plain.is_quantized or plain.is_meta:
        raise TypeError(
            f"a {type(t).__name__} on {t.device} in layout {t.layout} has no plain content to digest; "
            "give it as an ordinary tensor"
        )
    if plain.is_cuda:  # the threads copy on their own streams, which do not wait for the caller's
        torch.cuda.current_stream(plain.device).synchronize()
    return plain


def _root(dtype: torch.dtype, t: Tensor) -> hashlib._Hash:
    shape = ",".join(map(str, t.shape))
    return hashlib.sha256(f"pifa-compile tensor digest 1\n{_name(dtype)}\n{shape}\n".encode())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leaves(t: Tensor, start: int, dtypes: Sequence[torch.dtype]) -> list[bytes]:
    """sha256 of the chunk of ``t`` at ``start``: in its own dtype, the first of ``dtypes``, then in the others."""
    hashes = [hashlib.sha256() for _ in dtypes]
    casts = [torch.empty(_PIECE, dtype=dtype, device="cpu") for dtype in dtypes[1:]]
    wide = torch.empty(_PIECE, dtype=torch.float32, device="cpu")
    stop = min(start + CHUNK, t.numel())
    for begin in range(start, stop, _PIECE):
        piece = _elements(t, begin, min(begin + _PIECE, stop))
        for sha, form in zip(hashes, _forms(piece, wide, casts), strict=True):
            sha.update(memory_of(form))
    return [sha.digest() for sha in hashes]


def _forms(piece: Tensor, wide: Tensor, casts: Sequence[Tensor]) -> Iterator[Tensor]:
    """``piece`` itself, then converted to the dtype of each of the buffers ``casts``.

    By way of float32, as torch does itself from any dtype to a 16-bit one; in two steps it is faster: fp16 to bf16 runs
    at 1 G elements/s directly and at 3 G through float32 (one core).
    """
    yield piece
    if not casts:
        return
    source = piece if piece.dtype is wide.dtype else _convert(piece, wide)
    for buffer in casts:
        yield source if buffer.dtype is source.dtype else _convert(source, buffer)


def _elements(t: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of ``t`` in row-major order, as one row on the CPU.

    Copies no more than these, and nothing of a contiguous CPU tensor.
    """
    if t.is_contiguous():
        return t.view(-1)[start:stop].cpu()
    if t.dim() == 1:
        return t[start:stop].contiguous().cpu()
    row, parts = t[0].numel(), []
    while start < stop:
        i, offset = divmod(start, row)
        rows = 0 if offset else (stop - start) // row
        end = start + rows * row if rows else min(stop, start - offset + row)
        whole = t[i : i + rows].reshape(-1).contiguous().cpu() if rows else None
        parts.append(_elements(t[i], offset, offset + end - start) if whole is None else whole)
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _convert(piece: Tensor, buffer: Tensor) -> Tensor:
    """``piece`` in the dtype of ``buffer``, written into its front."""
    target = buffer[: piece.numel()]
    for out, part in zip(target.split(_SERIAL), piece.split(_SERIAL), strict=True):
        out.copy_(part)
    return target


def memory_of(row: Tensor) -> Any:
    """The memory of a contiguous row on the CPU as a buffer, for as long as the row is alive.

    Not by way of numpy: torch then never again resizes the storage, which is the caller's, and FSDP does that.
    """
    return (ctypes.c_char * row.nbytes).from_address(row.data_ptr()) if row.nbytes else b""
