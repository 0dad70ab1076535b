"""The factors that stand for a weight, and the arithmetic of their size.

m = out_features, n = in_features, r = rank. A rank-r weight W (m x n) is kept as r of its own rows,
``pivot_rows`` (r x n), and the ``coefficients`` (m-r x r) that make the other rows from them:

    y_p = x @ pivot_rows.T      y_np = y_p @ coefficients.T      y[pivots] = y_p, y[others] = y_np

Pivoting factorization: Zhao et al., ICML 2025 (arXiv 2501.19090).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import sympy
import torch
from torch import Tensor

from pifa_compile.errors import FactorError

M, N_IN, R = sympy.symbols("m n r", integer=True, positive=True)

#: Numbers kept per form; the row order of PIFA counts as one number per pivot.
NUMBERS: dict[str, sympy.Expr] = {
    "dense": M * N_IN,
    "pair": R * (M + N_IN),
    "pifa": R * (M + N_IN - R) + R,
}
#: Floating point operations per token (a multiply and an add count as two).
FLOP_PER_TOKEN: dict[str, sympy.Expr] = {
    "dense": 2 * M * N_IN,
    "pair": 2 * R * (M + N_IN),
    "pifa": 2 * R * (M + N_IN - R),
}

Form = Literal["dense", "pair", "pifa"]


def numbers(form: Form, m: int, n: int, r: int = 0) -> int:
    """How many numbers the ``form`` of an m x n weight at rank r keeps (bias excluded)."""
    if form == "dense":
        return m * n
    return r * (m + n) if form == "pair" else r * (m + n - r) + r


def flop_per_token(form: Form, m: int, n: int, r: int = 0) -> int:
    """Floating point operations to apply the ``form`` of an m x n weight to one token (bias excluded)."""
    if form == "dense":
        return 2 * m * n
    return 2 * r * (m + n) if form == "pair" else 2 * r * (m + n - r)


def rank_for_numbers(m: int, n: int, budget: float, multiple: int = 1, form: Form = "pifa") -> int:
    """The largest rank whose ``form`` keeps at most ``budget`` numbers, rounded down to ``multiple``; 0 if none does.

    The count grows with r up to min(m, n), so bisection finds it. A budget that is a whole number but for the rounding
    of density times m n counts as that number.
    """
    whole = math.floor(budget * (1 + 1e-12))
    low, high = 0, min(m, n)
    while low < high:
        middle = (low + high + 1) // 2
        if numbers(form, m, n, middle) <= whole:
            low = middle
        else:
            high = middle - 1
    return low - low % multiple


def rank_for_density(m: int, n: int, density: float, multiple: int = 1, form: Form = "pifa") -> int:
    """The largest rank that keeps at most ``density`` (0 to 1) of the m n numbers of a dense weight."""
    return rank_for_numbers(m, n, density * m * n, multiple, form)


def density_of_rank(m: int, n: int, r: int, form: Form = "pifa") -> float:
    """The fraction of the m n dense numbers that the ``form`` keeps at rank r."""
    return numbers(form, m, n, r) / (m * n)


@dataclass(frozen=True, eq=False)
class PifaFactors:
    """One weight in pivoted form.

    pivot_rows    r x n, rows of the low-rank weight, in ascending order of their place in it
    coefficients  (m-r) x r; may have another dtype than the pivot rows
    row_order     m, int32; entry i is the output row of position i in [pivots, others]
    y_scale       a power of two applied to y_p before it is rounded to the coefficients' dtype
    bias          m; replaces the layer's bias where the method changed it, None leaves the layer's own
    """

    pivot_rows: Tensor
    coefficients: Tensor
    row_order: Tensor
    y_scale: float = 1.0
    bias: Tensor | None = None
    form: ClassVar[Form] = "pifa"

    @property
    def rank(self) -> int:
        return self.pivot_rows.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight that the factors stand for."""
        return self.row_order.shape[0], self.pivot_rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.pivot_rows.dtype

    @property
    def device(self) -> torch.device:
        return self.pivot_rows.device

    @property
    def numbers(self) -> int:
        return numbers("pifa", *self.shape, self.rank)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    @cached_property
    def gather_order(self) -> Tensor:
        """m, int64: entry j is the position in [pivots, others] of output row j (the inverse of ``row_order``)."""
        return torch.argsort(self.row_order).to(torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their field name, for storage."""
        named = {"pivot_rows": self.pivot_rows, "coefficients": self.coefficients, "row_order": self.row_order}
        return named if self.bias is None else named | {"bias": self.bias}

    def part(
        self, start: int, stop: int, take: Callable[[Tensor, Tensor], Tensor] = torch.Tensor.__getitem__
    ) -> PifaFactors:
        """Factors of the rows from ``start`` to ``stop``, followed by the pivot rows that are outside of them.

        take  what gives the rows of the coefficients at places (int64) of them; by default a copy

        So one layer of a joint group can be run alone, from the same pivot rows (shared, not copied) and its own rows
        of the coefficients, without another rounding. Its output is the first ``stop - start`` features.
        """
        r, order = self.rank, self.row_order.to(torch.int64)
        inside = (order >= start) & (order < stop)
        kept = inside[r:].nonzero().flatten()
        foreign = torch.arange(r, device=order.device)[~inside[:r]]
        places = torch.empty(r, dtype=torch.int64, device=order.device)
        places[inside[:r]] = order[:r][inside[:r]] - start
        places[foreign] = stop - start + torch.arange(len(foreign), device=order.device)
        row_order = torch.cat([places, order[r:][kept] - start]).to(torch.int32)
        bias = None
        if self.bias is not None:
            bias = torch.cat([self.bias[start:stop], self.bias.new_zeros(len(foreign))])
        return PifaFactors(self.pivot_rows, take(self.coefficients, kept), row_order, self.y_scale, bias)

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The m x n weight that the factors stand for (C P, rows in their places), in ``dtype``."""
        pivot_rows = self.pivot_rows.to(dtype)
        stacked = torch.cat([pivot_rows, self.coefficients.to(dtype) @ pivot_rows])
        return stacked[self.gather_order]

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> PifaFactors:
        """The same factors in another dtype or on another device; in 16 bit a mixed form keeps its coefficients'."""
        mixed = self.coefficients.dtype != self.pivot_rows.dtype and (dtype is None or dtype.itemsize == 2)
        return replace(
            self,
            pivot_rows=self.pivot_rows.to(device=device, dtype=dtype),
            coefficients=self.coefficients.to(device=device, dtype=None if mixed else dtype),
            row_order=self.row_order.to(device=device),
            bias=None if self.bias is None else self.bias.to(device=device, dtype=dtype),
        )

    def validate(self, layer: str = "") -> PifaFactors:
        """Check that shapes, dtypes, the row order and the scale are possible; returns self, raises FactorError."""
        _check_matrices(layer, pivot_rows=self.pivot_rows, coefficients=self.coefficients)
        order = self.row_order
        if order.dtype != torch.int32 or order.dim() != 1:
            raise FactorError(layer, f"the row order is {order.dtype} in {order.dim()} dimensions, not int32 in one")
        (m, n), r = self.shape, self.rank
        if self.coefficients.shape != (m - r, r):
            found = tuple(self.coefficients.shape)
            raise FactorError(layer, f"coefficients are {found}, not ({m - r}, {r}), beside {r} x {n} pivot rows")
        if not torch.equal(order.sort().values.cpu(), torch.arange(m, dtype=torch.int32)):
            raise FactorError(layer, f"the row order does not name each of the {m} output rows once")
        if self.bias is not None and self.bias.shape != (m,):
            raise FactorError(layer, f"the bias is {tuple(self.bias.shape)}, not ({m},)")
        if not (0 < self.y_scale < math.inf and math.frexp(self.y_scale)[0] == 0.5):
            raise FactorError(layer, f"the scale {self.y_scale} is no power of two")
        return self


@dataclass(frozen=True, eq=False)
class PairFactors:
    """One weight as a plain low-rank pair: left (m x r) times right (r x n); bias as in PifaFactors."""

    left: Tensor
    right: Tensor
    bias: Tensor | None = None
    form: ClassVar[Form] = "pair"

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight that the factors stand for."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.right.dtype

    @property
    def device(self) -> torch.device:
        return self.right.device

    @property
    def numbers(self) -> int:
        return numbers("pair", *self.shape, self.rank)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their field name, for storage."""
        named = {"left": self.left, "right": self.right}
        return named if self.bias is None else named | {"bias": self.bias}

    def part(self, start: int, stop: int) -> PairFactors:
        """Factors of the rows from ``start`` to ``stop``, with the same right side (shared, not copied)."""
        bias = None if self.bias is None else self.bias[start:stop]
        return PairFactors(self.left[start:stop], self.right, bias)

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The m x n weight that the factors stand for, in ``dtype``."""
        return self.left.to(dtype) @ self.right.to(dtype)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> PairFactors:
        """The same factors in another dtype or on another device."""
        return PairFactors(**{name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()})

    def validate(self, layer: str = "") -> PairFactors:
        """Check that the shapes fit together; returns self, raises FactorError."""
        _check_matrices(layer, left=self.left, right=self.right)
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if left[1] != right[0]:
            raise FactorError(layer, f"left {left} and right {right} are no low-rank pair")
        if self.bias is not None and self.bias.shape != (self.left.shape[0],):
            raise FactorError(layer, f"the bias is {tuple(self.bias.shape)}, not ({self.left.shape[0]},)")
        return self


Factors = PifaFactors | PairFactors


def _check_matrices(layer: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dim() != 2 or not t.is_floating_point():
            raise FactorError(layer, f"{name} is {t.dtype} in {t.dim()} dimensions, not floating point in two")


def factors_from_tensors(tensors: dict[str, Tensor], y_scale: float = 1.0, layer: str = "") -> Factors:
    """Rebuild factors from the names that ``tensors()`` gave; raises FactorError on any other set of names."""
    names = set(tensors) - {"bias"}
    if names == {"pivot_rows", "coefficients", "row_order"}:
        return PifaFactors(**tensors, y_scale=y_scale).validate(layer)
    if names == {"left", "right"}:
        return PairFactors(**tensors).validate(layer)
    raise FactorError(layer, f"tensors named {sorted(tensors)} are no factors known here")
