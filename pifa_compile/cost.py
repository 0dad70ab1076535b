"""What a layer costs in each of its forms: bytes and operations as formulas, times on a machine of known speed.

m = out_features, n = in_features, r = rank, N = number of tokens, b = bytes of a number.

    seconds of a step = max(bytes / bandwidth, FLOP / rate at N tokens, elements gathered / gather rate)
                        + seconds of a call

A form is a sequence of steps. Bytes count every operand once. How fast a library multiplies few tokens is no matter of
bytes alone, so a machine's rates are kept by number of tokens; between these the rate is a line in logarithms. ``pifa
bench kernels`` shows predicted and measured times side by side. ``machine.py`` measures a machine; the tile tables of
the kernels know the roofs of theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import sympy

from pifa_compile.factors import N_IN, M, R

NONE = sympy.Integer(0)
TOKENS, ITEM = sympy.symbols("N b", integer=True, positive=True)

#: Bytes of a number, by the name of what it is multiplied as.
ITEMS = {"float32": 4, "tfloat32": 4, "bfloat16": 2, "float16": 2}


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


_FIRST, _SECOND = _product("first", R, N_IN), _product("second", M - R, R)
#: The order of int32 is turned into positions of int64, in two kernels.
_POSITIONS = (Step("places", 8 * M, NONE, NONE), Step("positions", 20 * M, NONE, NONE))

#: All of a layer in one call on a CPU. Measured, it takes as long as its bytes and its sums together, and not as the
#: longer of the two; sums at the highest rate of float32, and of bfloat16 two at a time.
FEW_TOKENS = "few tokens"

#: The steps of every form. On a CPU: ``dense``, ``pair``, ``pifa`` and ``pifa folded``, whose order went into its
#: readers, and FEW_TOKENS. Of the kernels for CUDA: ``gather``, products of the library, and ``tail``, which writes all
#: of Y.
STEPS: dict[str, tuple[Step, ...]] = {
    "dense": (_product("product", M, N_IN),),
    "pair": (_FIRST, _product("second", M, R)),
    "pifa": (_FIRST, _SECOND, Step("gather", 2 * ITEM * TOKENS * M, NONE, TOKENS * M)),
    "pifa folded": (_FIRST, _SECOND, Step("side by side", 2 * ITEM * TOKENS * M, NONE, NONE)),
    FEW_TOKENS: (
        Step(
            "layer",
            sympy.expand(ITEM * (R * (M + N_IN - R) + TOKENS * (N_IN + M))),
            2 * TOKENS * R * (M + N_IN - R),
            NONE,
        ),
    ),
    "gather": (_FIRST, _SECOND, *_POSITIONS, Step("gather", 2 * ITEM * TOKENS * M, NONE, NONE)),
    "tail": (
        _FIRST,
        Step("tail", sympy.expand(ITEM * (TOKENS * (R + M) + (M - R) * R)), 2 * TOKENS * (M - R) * R, NONE),
    ),
}


@dataclass(frozen=True)
class Profile:
    """How fast a machine is.

    device     its name, with the number of threads on a CPU
    bandwidth  bytes per second of one long read
    rates      FLOP per second of a product, by dtype name, then by number of tokens (ascending)
    gather     elements per second of a gather with a random order
    call       seconds of one call of a kernel with next to nothing to do
    """

    device: str
    bandwidth: float
    rates: Mapping[str, Mapping[int, float]]
    gather: float
    call: float

    def rate(self, dtype: str, tokens: int) -> float:
        """FLOP per second of a product of so many tokens."""
        known = self.rates[dtype]
        for (few, slow), (many, fast) in pairwise(known.items()):
            if few <= tokens <= many:
                share = math.log(tokens / few) / math.log(many / few)
                return float(slow ** (1 - share) * fast**share)
        return known[min(known) if tokens < min(known) else max(known)]

    def peak(self, dtype: str) -> float:
        """The highest of the rates."""
        return max(self.rates[dtype].values())


def time(form: str, N: int, m: int, n: int, r: int, dtype: str, profile: Profile) -> float:
    """Predicted seconds of one layer in ``form`` (a key of STEPS) on N tokens; r is not read for "dense"."""
    sizes, rate = (N, m, n, r, ITEMS[dtype]), profile.rate(dtype, N)
    if form == FEW_TOKENS:
        read, sums = work(form, N, m, n, r, dtype)
        rate = profile.peak("float32") * (2 if dtype == "bfloat16" else 1)
        return read / profile.bandwidth + sums / rate + profile.call
    total = 0.0
    for moved, flop, gathered in _functions(form):
        parts = moved(*sizes) / profile.bandwidth, flop(*sizes) / rate, gathered(*sizes) / profile.gather
        total += max(parts) + profile.call
    return total


def work(form: str, N: int, m: int, n: int, r: int, dtype: str) -> tuple[int, int]:
    """Bytes and floating point operations of all steps of a form together."""
    sizes = (N, m, n, r, ITEMS[dtype])
    steps = _functions(form)
    return int(sum(moved(*sizes) for moved, _, _ in steps)), int(sum(flop(*sizes) for _, flop, _ in steps))


def roof(form: str, N: int, m: int, n: int, r: int, dtype: str, profile: Profile) -> float:
    """Least seconds of the products of a form: at full bandwidth and the highest rate, without gathers and calls."""
    sizes, rate = (N, m, n, r, ITEMS[dtype]), profile.peak(dtype)
    steps = [(moved(*sizes), flop(*sizes)) for moved, flop, _ in _functions(form)]
    return sum(max(moved / profile.bandwidth, flop / rate) for moved, flop in steps if flop)


def fastest(forms: Sequence[str], N: int, m: int, n: int, r: int, dtype: str, profile: Profile) -> str:
    """The form with the least predicted time, the first of several."""
    return min(forms, key=lambda form: time(form, N, m, n, r, dtype, profile))


@functools.cache
def _functions(form: str) -> tuple[tuple[Callable[..., float], ...], ...]:
    symbols = (TOKENS, M, N_IN, R, ITEM)
    return tuple(tuple(sympy.lambdify(symbols, e) for e in (s.bytes, s.flop, s.gathered)) for s in STEPS[form])
