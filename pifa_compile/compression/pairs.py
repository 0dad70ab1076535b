"""Pairs that a model already has, pivoted once and kept in the store like any other factors."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pifa_compile import _torch
from pifa_compile.compression.layer import versions
from pifa_compile.digest import digest_many
from pifa_compile.pivoting import factorize, low_rank_of_pair
from pifa_compile.store import LayerRecord, RunHeader, Store, timestamp

RECIPE = {"method": "pair", "version": 1}


@dataclass(frozen=True)
class PairWeight:
    """Two weights that are applied one after the other: left (m x k) after right (k x n)."""

    name: str
    left: Tensor
    right: Tensor


def compress_pairs(pairs: Sequence[PairWeight], store: Store) -> list[LayerRecord]:
    """The records of the pairs' products, in order; what the store has already is not computed again."""
    digests = digest_many([t for pair in pairs for t in (pair.left, pair.right)])
    keys = [_both(left, right) for left, right in zip(digests[::2], digests[1::2], strict=True)]
    distinct = dict(zip(keys, pairs, strict=True))
    header = RunHeader(
        run_id=f"pair-{hashlib.sha256(''.join(distinct).encode()).hexdigest()[:12]}",
        model="low-rank pairs of a compiled graph",
        recipe=dict(RECIPE),
        versions=versions(),
        created=timestamp(),
        layers_planned=len(distinct),
    )
    with store.write_run(header) as writer:
        done = {digest: record for record in writer.done.values() for digest in record.digests.values()}
        for i, (key, pair) in enumerate(distinct.items()):
            if key not in done:
                done[key] = _pivot(f"{i} {pair.name}", pair, key, store)
                writer.add(done[key])
        writer.finish()
    return [done[key] for key in keys]


def _both(left: str, right: str) -> str:
    """A digest that stands for the product of two weights."""
    return f"sha256:{hashlib.sha256(f'pair {left} {right}'.encode()).hexdigest()}"


def _pivot(name: str, pair: PairWeight, key: str, store: Store) -> LayerRecord:
    started = time.perf_counter()
    made = factorize(low_rank_of_pair(pair.left, pair.right, pair.name), pair.left.dtype)
    _torch.counters()["factored"] += 1
    return LayerRecord(
        name=name,
        digests={_torch.dtype_name(pair.left.dtype): key},
        shape=made.factors.shape,
        object=store.put_factors(made.factors),
        form=made.factors.form,
        rank=made.factors.rank,
        numbers=made.factors.numbers,
        bytes=made.factors.nbytes,
        seconds=time.perf_counter() - started,
        error=made.error,
        truncation=0.0,
        least_error=0.0,
        reason=made.reason,
        details=made.details() | {"dtype": _torch.dtype_name(pair.left.dtype)},
    )
