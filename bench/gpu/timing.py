"""Seconds per call, with nothing of the previous call left in the cache, and a budget of seconds for the whole run."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: Inputs and weights of successive calls together are at least this large, so that no call finds its own in the cache.
ROTATED_BYTES = 200 << 20
REPEATS = 15
#: Seconds: of replays before the first that counts, as clocks rise, and of replays between two looks at the clock.
WARM_UP, AT_A_TIME = 0.05, 0.003


def inductor(device: str) -> str:
    """The compiler to measure; a rehearsal on the CPU stops before C++ is compiled."""
    return "inductor" if device == "cuda" else "aot_eager"


@dataclass
class Budget:
    """How much time is left."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def allows(self, seconds: float) -> bool:
        return self.left > seconds


@dataclass(frozen=True)
class Seconds:
    """Median seconds of one call, the 20th and 80th percentile, and what the first call gave when it was last timed."""

    median: float
    low: float
    high: float
    output: Any


def copies(nbytes: int, device: str, most: int = 48) -> int:
    """How many sets of weights and inputs of ``nbytes`` each to rotate."""
    return 1 if device == "cpu" else max(2, min(most, -(-ROTATED_BYTES // max(nbytes, 1))))


def seconds_per_call(calls: Sequence[Callable[[], Any]], device: str) -> Seconds:
    """The calls run one after the other, on a GPU as one CUDA graph, many times."""
    times, output = _on_cuda(calls) if device == "cuda" else _on_cpu(calls)
    per_call = sorted(t / len(calls) for t in times)
    fifth = len(per_call) // 5
    return Seconds(statistics.median(per_call), per_call[fifth], per_call[-1 - fifth], output)


def _on_cpu(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], Any]:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        output, *_ = [call() for call in calls]
        times.append(time.perf_counter() - begun)
    return times, output


def _on_cuda(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], Any]:
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output, *_ = [call() for call in calls]
    once = max(_replayed(graph, 1), 1e-6)
    _replayed(graph, math.ceil(WARM_UP / once))
    # Many at a time, or the time would be that of the CPU too, which takes longer to launch a graph than some run.
    count = math.ceil(AT_A_TIME / once)
    return [_replayed(graph, count) / count for _ in range(REPEATS)], output


def _replayed(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Seconds that the graph takes so many times over."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all measurements: libraries keep memory for every stream that they meet."""
    return torch.cuda.Stream()
