"""Times of several ways to do one thing, taken in turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: Bytes of weights, more than caches hold.
BEYOND_CACHES = 1 << 28


def beyond_caches(size: float, most: int) -> int:
    """How many layers of so many bytes, ``most`` at most, take turns so that each finds its weights in memory."""
    return min(most, math.ceil(BEYOND_CACHES / size))


def in_turns(runs: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.05) -> dict[str, float]:
    """Median seconds of one call of each run over ``rounds`` turns of about ``seconds`` each; all are called before."""
    counts = {name: max(1, round(seconds / _once(run))) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(_turn(run, counts[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def _once(run: Callable[[], object]) -> float:
    run()
    return max(1e-6, min(_turn(run, 1) for _ in range(3)))


def _turn(run: Callable[[], object], count: int) -> float:
    """Seconds of one of ``count`` calls without a pause."""
    _finish()
    begun = time.perf_counter()
    for _ in range(count):
        run()
    _finish()
    return (time.perf_counter() - begun) / count


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
