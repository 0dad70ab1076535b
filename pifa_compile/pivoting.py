"""Low rank to pivots: from a rank-r weight to PifaFactors, with the error of what is stored.

m = out_features, n = in_features, r = rank. Everything starts from ``LowRank``: W_r = coordinates @ basis, where the
basis (r x n) has orthonormal rows, so that the coordinates (m x r) hold all lengths and angles of the rows of W_r.
Row i of W_r is then a good pivot exactly if row i of the coordinates is: pivots are chosen on m x r, never on m x n.

Pivots: strong rank-revealing QR (Gu and Eisenstat 1996), maximum volume (Goreinov et al. 2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from pifa_compile.errors import WeightError
from pifa_compile.factors import Factors, PairFactors, PifaFactors

#: Relative error of stored factors against the low-rank weight above which the writer tries harder (see ``factorize``).
ERROR_LIMITS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}

#: Swaps of the maximum-volume search end when no coefficient exceeds this. 4096 x 4096, r 1199: 1.05 takes 58 swaps,
#: 0.3 s on two cores, and leaves coefficients of the size that full QR pivoting gives (norm 360 against 363; LU: 509).
MAXVOL_TOLERANCE = 1.05


@dataclass(frozen=True, eq=False)
class LowRank:
    """A weight of rank r as coordinates (m x r) in an orthonormal basis (r x n) of its row space."""

    coordinates: Tensor
    basis: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.coordinates.shape[0], self.basis.shape[1]

    def weight(self) -> Tensor:
        """The m x n weight."""
        return self.coordinates @ self.basis

    def pair(self, dtype: torch.dtype) -> PairFactors:
        """The weight as a plain pair in ``dtype``, both sides of like size so that rounding costs the same in each."""
        scale = self.coordinates.norm(dim=0).clamp_min(torch.finfo(self.coordinates.dtype).tiny).sqrt()
        return PairFactors((self.coordinates / scale).to(dtype), (self.basis * scale[:, None]).to(dtype))


# --- from weights and pairs to LowRank ------------------------------------------------------------------------------


def numerical_rank(singular_values: Tensor, m: int, n: int) -> int:
    """How many singular values (descending) stand above rounding in their dtype."""
    if singular_values.numel() == 0:
        return 0
    floor = singular_values[0] * max(m, n) * torch.finfo(singular_values.dtype).eps
    return int((singular_values > floor).sum())


def check_weight(weight: Tensor, layer: str = "") -> None:
    """Raise WeightError unless the weight is a finite, non-zero floating point matrix."""
    shape = tuple(weight.shape)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise WeightError(layer, f"a {weight.dtype} tensor of shape {shape}", "give a floating point matrix")
    if not bool(torch.isfinite(weight).all()):
        raise WeightError(layer, f"the {shape} weight has infinite or NaN entries", "repair it or skip the layer")
    if not bool(weight.any()):
        raise WeightError(layer, f"the {shape} weight is all zeros, so its rank is 0", "skip the layer")


def svd_of(weight: Tensor, layer: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """U (m x k), S (k), Vh (k x n) of a checked weight, k = min(m, n), in float32, or float64 for a float64 weight."""
    check_weight(weight, layer)
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    return u, s, vh


def low_rank_of_pair(left: Tensor, right: Tensor, layer: str = "") -> LowRank:
    """LowRank of left (m x k) @ right (k x n); its rank is found, at most k."""
    check_weight(left, layer)
    check_weight(right, layer)
    orthonormal, triangle = torch.linalg.qr(right.detach().double().T)
    coordinates = left.detach().double() @ triangle.T
    # The singular values of the coordinates are those of the product.
    u, s, vh = torch.linalg.svd(coordinates, full_matrices=False)
    work = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    r = numerical_rank(s.to(work), left.shape[0], right.shape[1])
    if r == 0:
        raise WeightError(layer, "the product of the pair is zero", "skip the layer")
    return LowRank(u[:, :r] * s[:r], vh[:r] @ orthonormal.T)


# --- choosing pivots -------------------------------------------------------------------------------------------------


def qr_pivots(coordinates: Tensor) -> Tensor:
    """r rows of the coordinates (m x r) by column-pivoted QR of their transpose (LAPACK geqp3)."""
    host = coordinates.float() if coordinates.dtype != torch.float64 else coordinates
    *_, order = scipy.linalg.qr(host.cpu().numpy().T, mode="raw", pivoting=True)
    return torch.from_numpy(order[: coordinates.shape[1]]).to(coordinates.device, torch.int64)


def lu_pivots(coordinates: Tensor) -> Tensor:
    """r rows of the coordinates (m x r) by LU with partial pivoting: fastest, coefficients 1.4 times those of QR."""
    order, _ = _lu(coordinates)
    return order[: coordinates.shape[1]]


def maxvol_pivots(coordinates: Tensor, tolerance: float = MAXVOL_TOLERANCE) -> Tensor:
    """LU pivots, improved by swaps of one pivot for one other row until no coefficient exceeds ``tolerance``.

    A swap at coefficient c multiplies the volume of the pivots by |c| and is a rank-one update of all coefficients.
    """
    r = coordinates.shape[1]
    order, c = _lu(coordinates)
    if c.numel() == 0:
        return order[:r]
    for _ in range(2 * r + 16):  # weights seen so far need far fewer; more swaps than this would be worth less than QR
        i, j = divmod(int(c.abs().argmax()), r)
        pivot = float(c[i, j])
        if abs(pivot) <= tolerance:
            break
        column, row = c[:, j].clone(), c[i].clone()
        row[j] -= 1
        column[i] += 1
        c.addr_(column, row, alpha=-1 / pivot)
        order[[j, r + i]] = order[[r + i, j]]
    return order[:r]


def _lu(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Row order of LU with partial pivoting, and the coefficients (m-r x r) that the first r rows give the others."""
    m, r = coordinates.shape
    lu, swaps = torch.linalg.lu_factor(coordinates)
    order = list(range(m))
    for i, p in enumerate((swaps - 1).tolist()):
        order[i], order[p] = order[p], order[i]
    coefficients = torch.linalg.solve_triangular(lu[:r], lu[r:], upper=False, unitriangular=True, left=False)
    return torch.tensor(order, device=coordinates.device), coefficients.contiguous()


def group_pivots(coordinates: Tensor, group: int) -> Tensor:
    """r rows of the coordinates (m x r) in aligned groups of ``group`` rows (m and r multiples of it).

    Each step takes the group whose residual rows span the largest volume and projects them out of all others. Where no
    group adds to the span in full (equal or zero rows in each), the pivots are distinct but poor, see ``factorize``.
    """
    m, r = coordinates.shape
    if m % group or r % group:
        raise ValueError(f"aligned groups of {group} rows need m and r to be multiples of it, not m={m}, r={r}")
    residual = coordinates.double().clone()
    lowest = torch.finfo(residual.dtype).min
    chosen: list[int] = []
    for _ in range(r // group):
        blocks = residual.view(m // group, group, r)
        volume = torch.linalg.slogdet(blocks @ blocks.transpose(1, 2)).logabsdet.nan_to_num(nan=lowest, neginf=lowest)
        volume[chosen] = -torch.inf  # below every other, also below a group without volume
        best = int(volume.argmax())
        chosen.append(best)
        directions = torch.linalg.qr(blocks[best].T).Q
        residual -= (residual @ directions) @ directions.T
    starts = torch.tensor(chosen, device=coordinates.device)[:, None] * group
    return (starts + torch.arange(group, device=coordinates.device)).flatten()


PIVOTINGS: dict[str, Callable[[Tensor], Tensor]] = {"maxvol": maxvol_pivots, "qr": qr_pivots, "lu": lu_pivots}


def choose_pivots(coordinates: Tensor, pivoting: str = "maxvol", group: int = 1) -> Tensor:
    """r pivot rows, ascending (int64), of coordinates (m x r): by a name in PIVOTINGS, or in aligned groups."""
    rows = group_pivots(coordinates, group) if group > 1 else PIVOTINGS[pivoting](coordinates)
    return rows.sort().values


# --- factors ---------------------------------------------------------------------------------------------------------


def pivot(
    low_rank: LowRank, pivots: Tensor, dtype: torch.dtype, coefficient_dtype: torch.dtype | None = None
) -> tuple[PifaFactors, float]:
    """Factors of ``low_rank`` for the given pivot rows, stored in ``dtype``, and their relative Frobenius error.

    The pivot rows are rounded first; the coefficients are then the least-squares fit, in float64, of the other rows
    against the ROUNDED pivot rows. The error is measured against the low-rank weight with both roundings in it.
    Coefficients of another dtype come with the scale of y_p that keeps it in the middle of that dtype's range.
    """
    a, v = low_rank.coordinates.double(), low_rank.basis.double()
    m = a.shape[0]
    is_pivot = torch.zeros(m, dtype=torch.bool, device=a.device).index_fill_(0, pivots, True)
    others = (~is_pivot).nonzero().flatten()
    a_pivots, a_others = a[pivots], a[others]

    exact_rows = a_pivots @ v
    pivot_rows = exact_rows.to(dtype)
    # What rounding changed is small, so its relative precision is all that counts: float32 unless the store is float64.
    small = torch.float64 if dtype == torch.float64 else torch.float32
    change = (pivot_rows.double() - exact_rows).to(small)
    change_inside = change @ v.to(small).T
    outside = change - change_inside @ v.to(small)  # what rounding put outside the row space of the weight
    outside_gram = (outside @ outside.T).double()
    inside = a_pivots + change_inside.double()  # r x r: the rounded rows within it
    if dtype == torch.float64:  # nothing is rounded, and the gram matrix would square the condition number
        fitted = _solve(inside.T, a_others.T)
    else:
        fitted = _solve_spd(inside @ inside.T + outside_gram, inside @ a_others.T)
    coefficients = fitted.T.to(coefficient_dtype or dtype)

    # Rows of the basis are orthonormal and `outside` is orthogonal to them, so the squared errors add up.
    c = coefficients.double()
    squared = (
        (inside - a_pivots).square().sum()
        + outside.square().sum()
        + (c @ inside - a_others).square().sum()
        + ((c @ outside_gram) * c).sum()
    )
    order = torch.cat([pivots, others]).to(torch.int32)
    y_scale = 1.0 if coefficients.dtype == dtype else _scale_of(pivot_rows)
    return PifaFactors(pivot_rows, coefficients.contiguous(), order, y_scale), float(squared.sqrt() / a.norm())


def refit(factors: PifaFactors, low_rank: LowRank, gram: Tensor) -> PifaFactors:
    """The factors with the coefficients C that lose least of what the other rows make of given inputs.

    gram  G, second moments of the inputs (n x n, positive definite). Minimises tr((C P - W) G (C P - W)^T) over the
          other rows of the low-rank weight W, in float64, for the ROUNDED pivot rows P.
    """
    rows = factors.pivot_rows.double()
    others = factors.row_order[factors.rank :].to(torch.int64)
    wide = gram.to(rows)
    wanted = low_rank.coordinates.double()[others] @ (low_rank.basis.double() @ (wide @ rows.T))
    fitted = _solve_spd(rows @ wide @ rows.T, wanted.T).T
    return replace(factors, coefficients=fitted.to(factors.coefficients.dtype).contiguous())


def _scale_of(pivot_rows: Tensor) -> float:
    """A power of two that brings y_p near 1 for x of unit size: float16 then has room for 65,000 times as much."""
    longest = float(pivot_rows.float().norm(dim=1).max())
    return 2.0 ** -round(math.log2(longest)) if longest > 0 else 1.0


def _solve(square: Tensor, right: Tensor) -> Tensor:
    """square^-1 @ right in float64, by least squares if it is singular."""
    found: Tensor
    found, info = torch.linalg.solve_ex(square, right)
    if int(info) or not bool(torch.isfinite(found).all()):
        found = torch.linalg.pinv(square) @ right
    return found


def _solve_spd(gram: Tensor, right: Tensor) -> Tensor:
    """gram^-1 @ right for a symmetric positive definite float64 gram, by least squares if it is near singular.

    All NaN for a gram that is not finite: rows that overflowed in the dtype they are stored in.
    """
    if not bool(torch.isfinite(gram).all()):
        return torch.full_like(right, torch.nan)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) == 0:
        return torch.cholesky_solve(right, factor)
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return inverse @ right


def weight_error(factors: Factors, low_rank: LowRank) -> float:
    """Relative Frobenius error of stored factors against the low-rank weight, in float64."""
    exact = low_rank.coordinates.double() @ low_rank.basis.double()
    return float((factors.weight() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Factorized:
    """Factors of one weight, their relative error against the low-rank weight, and how they came about."""

    factors: Factors
    error: float
    pivoting: str
    reason: str | None = None

    def details(self) -> dict[str, Any]:
        """What a report may want to know: the pivoting used and the size of the coefficients."""
        if isinstance(self.factors, PairFactors):
            return {"pivoting": self.pivoting}
        c = self.factors.coefficients.double()
        largest = float(c.abs().max()) if c.numel() else 0.0
        return {"pivoting": self.pivoting, "max_coefficient": largest, "coefficient_norm": float(c.norm())}


def factorize(
    low_rank: LowRank,
    dtype: torch.dtype,
    *,
    pivoting: str = "maxvol",
    group: int = 1,
    form: str = "pifa",
    coefficients: str = "same",
    gram: Tensor | None = None,
) -> Factorized:
    """Factors of a low-rank weight in ``dtype``: as asked for, else by QR pivoting, else as the pair.

    The next one is tried when the error of the stored factors exceeds ERROR_LIMITS (three times that for aligned
    groups, whose pivots are less free). ``form="pair"`` asks for the plain pair; ``coefficients="float16"`` for
    coefficients, and y_p, in float16 where ``dtype`` is bfloat16. ``gram`` as in ``refit``.
    """
    mixed = torch.float16 if coefficients == "float16" and dtype == torch.bfloat16 else None
    pair = low_rank.pair(dtype)
    if form == "pair":
        return Factorized(pair, weight_error(pair, low_rank), "none")
    attempts = [(pivoting, group)] + ([("qr", 1)] if (pivoting, group) != ("qr", 1) else [])
    smallest = float("inf")
    for name, rows in attempts:
        factors, error = pivot(low_rank, choose_pivots(low_rank.coordinates, name, rows), dtype, mixed)
        label = name if rows == 1 else f"groups of {rows}"
        if error <= ERROR_LIMITS[dtype] * (3 if rows > 1 else 1):
            if gram is not None:
                factors = refit(factors, low_rank, gram)
                error = weight_error(factors, low_rank)
            return Factorized(factors, error, label)
        smallest = min(smallest, error)
    found = f"pivoted factors in {dtype} have a relative error of {smallest:.1e}"
    reason = f"kept as a pair: {found}, above {ERROR_LIMITS[dtype]:.1e}"
    return Factorized(pair, weight_error(pair, low_rank), "none", reason)
