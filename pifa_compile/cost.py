"""What a layer costs in each of its forms: bytes and operations as formulas, and a machine's speed, measured once.

m = out_features, n = in_features, r = rank, N = number of tokens, b = bytes of a number.

    seconds of a step = max(bytes / bandwidth, FLOP / rate, elements gathered / gather rate) + seconds of a call

A form is a sequence of steps. Bytes count every operand once, so the prediction is a roof: a product that a library
runs badly, or weights that stay in a cache from one call to the next, fall on either side of it. ``pifa bench`` shows
both numbers side by side.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import sympy
import torch
import torch.nn.functional as F

from pifa_compile import _torch
from pifa_compile.factors import N_IN, Form, M, R
from pifa_compile.store import default_root
from pifa_compile.store.files import write

NONE = sympy.Integer(0)
TOKENS, ITEM = sympy.symbols("N b", integer=True, positive=True)

#: Of the file that keeps a profile; another version is measured again.
VERSION = 1


@dataclass(frozen=True)
class Step:
    """One kernel: bytes moved, floating point operations, and elements that are gathered one by one."""

    name: str
    bytes: sympy.Expr
    flop: sympy.Expr
    gathered: sympy.Expr


def _product(name: str, rows: sympy.Expr, columns: sympy.Expr) -> Step:
    """N tokens of ``columns`` features times a rows x columns matrix."""
    traffic = ITEM * (TOKENS * columns + rows * columns + TOKENS * rows)
    return Step(name, sympy.expand(traffic), 2 * TOKENS * rows * columns, NONE)


#: The steps of every form; ``pifa folded`` is a layer whose order went into its readers.
STEPS: dict[str, tuple[Step, ...]] = {
    "dense": (_product("product", M, N_IN),),
    "pair": (_product("first", R, N_IN), _product("second", M, R)),
    "pifa": (
        _product("first", R, N_IN),
        _product("second", M - R, R),
        Step("gather", 2 * ITEM * TOKENS * M, NONE, TOKENS * M),
    ),
    "pifa folded": (
        _product("first", R, N_IN),
        _product("second", M - R, R),
        Step("side by side", 2 * ITEM * TOKENS * M, NONE, NONE),
    ),
}


@dataclass(frozen=True)
class Profile:
    """How fast a machine is.

    device     its name, with the number of threads on a CPU
    bandwidth  bytes per second of one long read
    rates      FLOP per second of a large product, by dtype name
    gather     elements per second of a gather with a random order
    call       seconds of one call of a kernel with next to nothing to do
    """

    device: str
    bandwidth: float
    rates: dict[str, float]
    gather: float
    call: float


def time(form: str, N: int, m: int, n: int, r: int, dtype: torch.dtype, profile: Profile) -> float:
    """Predicted seconds of one layer in ``form`` (a key of STEPS) on N tokens; r is not read for "dense"."""
    sizes, rate = (N, m, n, r, dtype.itemsize), profile.rates[_torch.dtype_name(dtype)]
    total = 0.0
    for moved, flop, gathered in _functions(form):
        work = moved(*sizes) / profile.bandwidth, flop(*sizes) / rate, gathered(*sizes) / profile.gather
        total += max(work) + profile.call
    return total


def work(form: str, N: int, m: int, n: int, r: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes and floating point operations of all steps of a form together."""
    sizes = (N, m, n, r, dtype.itemsize)
    steps = _functions(form)
    return int(sum(moved(*sizes) for moved, _, _ in steps)), int(sum(flop(*sizes) for _, flop, _ in steps))


def roof(form: str, N: int, m: int, n: int, r: int, dtype: torch.dtype, profile: Profile) -> float:
    """Least seconds of the products of a form: ``time`` without gathers and calls."""
    sizes, rate = (N, m, n, r, dtype.itemsize), profile.rates[_torch.dtype_name(dtype)]
    steps = [(moved(*sizes), flop(*sizes)) for moved, flop, _ in _functions(form)]
    return sum(max(moved / profile.bandwidth, flop / rate) for moved, flop in steps if flop)


def fastest(forms: Sequence[Form], N: int, m: int, n: int, r: int, dtype: torch.dtype, profile: Profile) -> Form:
    """The form with the least predicted time."""
    return min(forms, key=lambda form: time(form, N, m, n, r, dtype, profile))


@functools.cache
def _functions(form: str) -> tuple[tuple[Callable[..., float], ...], ...]:
    symbols = (TOKENS, M, N_IN, R, ITEM)
    return tuple(tuple(sympy.lambdify(symbols, e) for e in (s.bytes, s.flop, s.gathered)) for s in STEPS[form])


# --- profiles --------------------------------------------------------------------------------------------------------


def device_name(device: torch.device | str = "cpu") -> str:
    """What a profile is kept under: the card, or the processor and the threads that torch uses."""
    if torch.device(device).type != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def profile(device: torch.device | str = "cpu", *, root: Path | None = None, measure: bool = True) -> Profile | None:
    """The machine's profile, kept beside the store (``root``); measured in a few seconds if there is none yet.

    None if there is none and ``measure`` is False.
    """
    name = device_name(device)
    path = (root or default_root()) / "machines" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    kept = _read(path, name)
    if kept is None and measure:
        kept = measure_profile(device)
        place = root or default_root()
        write(place, path, json.dumps({"version": VERSION} | asdict(kept), indent=1).encode() + b"\n")
    return kept


def _read(path: Path, name: str) -> Profile | None:
    """The profile in the file; None if there is none, or it is of another version or device, or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("version") != VERSION or data["device"] != name:
            return None
        return Profile(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure_profile(device: torch.device | str = "cpu") -> Profile:
    """Measure the machine."""
    place = torch.device(device)
    large = torch.empty(1 << 26, device=place).fill_(1.0)  # 256 MB: more than any cache
    rates = {}
    tokens, w = (512, 1024) if place.type == "cpu" else (4096, 4096)
    for dtype in DTYPES:
        x, weight = (torch.ones(rows, w, dtype=dtype, device=place) for rows in (tokens, w))
        product = functools.partial(F.linear, x, weight)
        rates[_torch.dtype_name(dtype)] = 2 * tokens * w * w / _seconds(product, place)
    # In float32, where ATen is as fast as the loops of Inductor, which take as long for elements of any size.
    x, order = torch.ones(tokens, w, device=place), torch.randperm(w).to(place)
    small = torch.ones(1, 8, device=place)
    return Profile(
        device=device_name(device),
        bandwidth=large.nbytes / _seconds(large.sum, place),
        rates=rates,
        gather=tokens * w / _seconds(lambda: x.index_select(-1, order), place),
        call=_seconds(lambda: F.linear(small, small), place),
    )


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of one call: the least of a few repeats of about 20 ms, as whoever else is there only adds to it."""

    def batch(count: int) -> float:
        begun = clock.perf_counter()
        for _ in range(count):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock.perf_counter() - begun

    batch(2)
    count = max(1, min(1000, int(0.02 / max(batch(1), 1e-7))))
    return min(batch(count) for _ in range(repeats)) / count


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
