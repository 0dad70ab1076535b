"""Times of several ways to do one thing, taken in turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: More numbers than any cache holds: 128 MB in float32.
BEYOND_CACHES = 1 << 25
#: Calls in one turn of cold runs: each is preceded by a read of all those numbers, which takes milliseconds.
COLD_CALLS = 10


def in_turns(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.05, cold: bool = False
) -> dict[str, float]:
    """Median seconds of one call of each run over ``rounds`` turns of about ``seconds`` each; all are called before.

    cold  before each call other memory is read, so that weights come from memory and not from a cache, as they do in
          a model with more weights than the caches hold
    """
    turn = _ColdTurn() if cold else _turn
    counts = {name: max(1, round(seconds / _once(run))) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(turn(run, counts[name]))
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


class _ColdTurn:
    """The same, of calls that find the caches full of something else."""

    def __init__(self) -> None:
        self._other = torch.ones(BEYOND_CACHES, device="cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, run: Callable[[], object], count: int) -> float:
        times = []
        for _ in range(min(count, COLD_CALLS)):
            self._other.sum()
            times.append(_turn(run, 1))
        return statistics.median(times)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
