"""How fast this machine is: its profile for the cost model, measured once and kept beside the store."""

from __future__ import annotations

import functools
import itertools
import json
import math
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from pifa_compile import _torch
from pifa_compile.cost import Profile
from pifa_compile.errors import StoreError
from pifa_compile.store import default_root
from pifa_compile.store.files import read, write
from pifa_compile.store.json_text import parse

#: Of the file that keeps a profile; another version is measured again.
VERSION = 2

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Numbers of tokens at which products are measured.
TOKENS = (1, 4, 16, 64, 128, 512)
#: Up to so many tokens a product's weight is read from memory, as in a model; with more that makes no difference.
FEW = 16
_LONGEST = 1 << 16  # bytes of a file with a profile


def device_name(device: torch.device | str = "cpu") -> str:
    """What a profile is kept under: the card, or the processor and the threads that torch uses; else the kind alone."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    if kind != "cpu":  # "meta", on which nothing takes time
        return kind
    return f"{_processor()}, {torch.get_num_threads()} threads"


def profile(device: torch.device | str = "cpu", *, root: Path | None = None, measure: bool = True) -> Profile | None:
    """The machine's profile, kept beside the store (``root``); measured in a few seconds if there is none yet.

    None if there is none and ``measure`` is False.
    """
    name = device_name(device)
    place = (root or default_root()).resolve()
    path = place / "machines" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    kept = _read(place, path, name)
    if kept is None and measure:
        kept = measure_profile(device)
        write(place, path, json.dumps({"version": VERSION} | asdict(kept), indent=1).encode() + b"\n")
    return kept


def _read(root: Path, path: Path, name: str) -> Profile | None:
    """The profile in the file; None if there is none, or it is of another version or device, or damaged."""
    try:
        data = parse(read(root, path, _LONGEST))
        if data.pop("version") != VERSION or data["device"] != name:
            return None
        rates = {
            dtype: dict(sorted((int(tokens), float(rate)) for tokens, rate in known.items()))
            for dtype, known in data.pop("rates").items()
        }
        found = Profile(rates=rates, **data)
        return found if _is_possible(found) else None
    except (OSError, StoreError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_possible(profile: Profile) -> bool:
    """Whether every prediction can be made with it."""
    rates = [rate for known in profile.rates.values() for rate in known.values()]
    numbers = (profile.bandwidth, profile.gather, profile.call, *rates)
    tokens = [count for known in profile.rates.values() for count in known]
    complete = all(profile.rates.get(_torch.dtype_name(dtype)) for dtype in DTYPES)
    return complete and all(0 < number < math.inf for number in (*numbers, *tokens))


def measure_profile(device: torch.device | str = "cpu") -> Profile:
    """Measure the machine."""
    place = torch.device(device)
    large = torch.empty(1 << 26, device=place).fill_(1.0)  # 256 MB: more than any cache
    bandwidth = large.nbytes / _seconds(large.sum, place)
    rates = {_torch.dtype_name(dtype): {N: _rate(N, dtype, place) for N in TOKENS} for dtype in DTYPES}
    # In float32, where ATen is as fast as the loops of Inductor, which take as long for elements of any size.
    tokens, w = (512, 1024) if place.type == "cpu" else (4096, 4096)
    x, order = torch.ones(tokens, w, device=place), torch.randperm(w).to(place)
    small = torch.ones(1, 8, device=place)
    return Profile(
        device=device_name(device),
        bandwidth=bandwidth,
        rates=rates,
        gather=tokens * w / _seconds(lambda: x.index_select(-1, order), place),
        call=_seconds(lambda: F.linear(small, small), place),
    )


def _rate(tokens: int, dtype: torch.dtype, place: torch.device) -> float:
    """FLOP per second of products with square weights, 128 MB of them in turns where few tokens read each."""
    w = (2048 if tokens <= FEW else 1024) if place.type == "cpu" else 4096
    count = (1 << 27) // (w * w * dtype.itemsize) if tokens <= FEW else 1
    x = torch.ones(tokens, w, dtype=dtype, device=place)
    weights = itertools.cycle([torch.ones(w, w, dtype=dtype, device=place) for _ in range(count)])
    return 2 * tokens * w * w / _seconds(lambda: F.linear(x, next(weights)), place)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of one call: the least of a few repeats of about 20 ms, as whoever else is there only adds to it."""

    def batch(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    batch(2)
    count = max(1, min(1000, int(0.02 / max(batch(1), 1e-7))))
    return min(batch(count) for _ in range(repeats)) / count


@functools.cache
def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
