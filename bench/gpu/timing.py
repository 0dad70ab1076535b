"""Seconds per call, with nothing of the previous call left in the cache, and a budget of seconds for the whole run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: Inputs and weights of successive calls together are at least this large, so that no call finds its own in the cache.
ROTATED_BYTES = 200 << 20
REPEATS = 15


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
    """Median seconds of one call, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def copies(nbytes: int, device: str, most: int = 48) -> int:
    """How many sets of weights and inputs of ``nbytes`` each to rotate."""
    return 1 if device == "cpu" else max(2, min(most, -(-ROTATED_BYTES // max(nbytes, 1))))


def seconds_per_call(calls: Sequence[Callable[[], Any]], device: str) -> Seconds:
    """The calls run one after the other, on a GPU as one CUDA graph, many times."""
    times = _on_cuda(calls) if device == "cuda" else _on_cpu(calls)
    per_call = sorted(t / len(calls) for t in times)
    fifth = len(per_call) // 5
    return Seconds(statistics.median(per_call), per_call[fifth], per_call[-1 - fifth])


def _on_cpu(calls: Sequence[Callable[[], Any]]) -> list[float]:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - begun)
    return times


def _on_cuda(calls: Sequence[Callable[[], Any]]) -> list[float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times
