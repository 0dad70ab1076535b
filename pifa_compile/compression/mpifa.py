"""Low-rank weights fitted to what the layer reads and to what the loss makes of its errors.

m = out_features, n = in_features, r = rank. With the moments of the inputs, L L^T = G = X X^T, the cross moment
K = Y X^T of the wanted outputs Y, and the output weighting S S^T = H, the weight B of rank r that minimises
||S^T (B X - Y)|| is the truncated SVD of S^T K L^-T = P D Q^T, taken back: B = S^-T P_r D_r Q_r^T L^-1
(reduced-rank regression, Izenman 1975). With Y = W X it is SVD-LLM (Wang et al., ICLR 2025). With Y mixed from two
flows it is the target of MPIFA (Zhao et al., ICML 2025, arXiv 2501.19090), whose own two-step solver is here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pifa_compile.compression.whitening import Whitening
from pifa_compile.pivoting import LowRank, numerical_rank

#: Added to H, relative to its mean eigenvalue. Anything from 0.01 to 1 gives the same perplexity within 0.1 %.
DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class OutputWeighting:
    """S of S S^T = H + damping: m x m, lower triangular, for the full form; m numbers for the diagonal one; or None."""

    root: Tensor | None = None

    def apply(self, outputs: Tensor) -> Tensor:
        """S^T Y (m x ...)."""
        if self.root is None:
            return outputs
        return self.root[:, None] * outputs if self.root.dim() == 1 else self.root.T @ outputs

    def pieces(self, m: int) -> Iterator[tuple[OutputWeighting, slice]]:
        """The weighting of each layer, and its rows among all m: of one layer here."""
        yield self, slice(0, m)

    def remove(self, weighted: Tensor) -> Tensor:
        """S^-T Z (m x ...)."""
        if self.root is None:
            return weighted
        if self.root.dim() == 1:
            return weighted / self.root[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self.root.T, weighted, upper=True)
        return solved


@dataclass(frozen=True, eq=False)
class StackedWeighting:
    """The weightings of layers whose rows are stacked, with m of each."""

    parts: Sequence[OutputWeighting]
    sizes: Sequence[int]

    def apply(self, outputs: Tensor) -> Tensor:
        """S^T Y (m x ...), S block-diagonal."""
        found = torch.empty_like(outputs)
        for part, rows in self.pieces(len(outputs)):
            found[rows] = part.apply(outputs[rows])
        return found

    def remove(self, weighted: Tensor) -> Tensor:
        """S^-T Z (m x ...)."""
        found = torch.empty_like(weighted)
        for part, rows in self.pieces(len(weighted)):
            found[rows] = part.remove(weighted[rows])
        return found

    def pieces(self, m: int) -> Iterator[tuple[OutputWeighting, slice]]:
        """The weighting of each layer, and its rows among all m."""
        start = 0
        for part, m in zip(self.parts, self.sizes, strict=True):
            yield part, slice(start, start + m)
            start += m


Weighting = OutputWeighting | StackedWeighting


def output_weighting(moments: Tensor | None, damping: float = DAMPING) -> OutputWeighting:
    """The weighting by gradient moments H (m x m) or their diagonal (m); none for None and for moments that vanish.

    ``damping`` times the mean of the diagonal is added to it, so that H may be singular.
    """
    if moments is None:
        return OutputWeighting()
    powers = moments if moments.dim() == 1 else moments.diagonal()
    mean = float(powers.double().mean())
    if not 0 < mean < float("inf"):
        return OutputWeighting()
    if moments.dim() == 1:
        return OutputWeighting((moments.double() + damping * mean).sqrt())
    damped = moments.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * mean)
    root, info = torch.linalg.cholesky_ex(damped)
    return OutputWeighting((powers.double() + damping * mean).sqrt() if int(info) else root)


def whitened_target(weight: Tensor, whitening: Whitening, drift: Tensor | None = None) -> Tensor:
    """T = K L^-T (m x n), the wanted outputs K = W (G + drift) in whitened form.

    drift  n x n: mixing (X_o X_c^T - X_c X_c^T) where the wanted outputs mix a dense flow X_o with the compressed flow
           X_c; None where they are W X

    The ridge in L L^T pulls towards W itself, not towards zero, so directions that no token excites keep W.
    """
    wide = weight.double()
    target = whitening.apply(wide)
    return target if drift is None else target + whitening.project(wide @ drift)


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """The best weights of every rank at once: S^T T = P D Q^T.

    left, values, right  P (m x k), D (k), Q^T (k x n) of the weighted and whitened target
    """

    left: Tensor
    values: Tensor
    right: Tensor
    whitening: Whitening
    weighting: Weighting

    @property
    def rank(self) -> int:
        """The numerical rank of the target."""
        return numerical_rank(self.values, self.left.shape[0], self.right.shape[1])

    def truncate(self, r: int) -> LowRank:
        """The weight of rank r that minimises the objective."""
        left = self.weighting.remove(self.left[:, :r] * self.values[:r])
        return orthonormal(left, self.whitening.remove(self.right[:r]))


def closed_form(target: Tensor, whitening: Whitening, weighting: Weighting | None = None) -> ClosedForm:
    """Solve min ||S^T (B L - T)|| over B of any rank, for a whitened target T (m x n)."""
    weighting = weighting or OutputWeighting()
    left, values, right = _thin_svd(lambda: weighting.apply(target))
    return ClosedForm(left, values, right, whitening, weighting)


def _thin_svd(make: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of a matrix that is made here, so that it is gone as soon as it can be.

    Of a tall one by way of its QR decomposition: with two matrices of its size at a time in place of four.
    """
    matrix = make()
    if matrix.shape[0] < 2 * matrix.shape[1]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    basis, triangle = torch.linalg.qr(matrix)
    del matrix
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    return basis @ left, values, right


@dataclass(frozen=True, eq=False)
class Alternating:
    """The published solver: from SVD-LLM, one least-squares step for the left factor, then one for the right.

    target   T = K L^-T (m x n)
    start    the SVD of W L
    """

    target: Tensor
    start: ClosedForm

    @property
    def rank(self) -> int:
        """The numerical rank of the weight as the inputs see it."""
        return self.start.rank

    def truncate(self, r: int) -> LowRank:
        """The weight of rank r after one round of both steps; of lower rank where the left factor lost some."""
        left = self.target @ self.start.right[:r].T  # V L has orthonormal rows, so V G V^T is the identity
        u, s, _ = torch.linalg.svd(left, full_matrices=False)
        basis = u[:, : numerical_rank(s, *left.shape)]
        return orthonormal(basis, self.start.whitening.remove(basis.T @ self.target))


def alternating(weight: Tensor, target: Tensor, whitening: Whitening) -> Alternating:
    """The published two-step solution for a weight (m x n) and a whitened target T (m x n)."""
    return Alternating(target, closed_form(whitening.apply(weight.double()), whitening))


def objective(low_rank: LowRank, target: Tensor, whitening: Whitening, weighting: Weighting | None = None) -> float:
    """||S^T (B L - T)||, what the solvers minimise, over the norm of S^T T."""
    weighting = weighting or OutputWeighting()
    lost = wanted = 0.0
    for part, rows in weighting.pieces(target.shape[0]):  # one layer's at a time: each would be as large as the target
        made = LowRank(low_rank.coordinates[rows], low_rank.basis).weight().double()
        lost += float(part.apply(whitening.apply(made).sub_(target[rows])).square_().sum())
        wanted += float(part.apply(target[rows]).square().sum())
    return math.sqrt(lost / wanted)


def orthonormal(left: Tensor, right: Tensor) -> LowRank:
    """LowRank of left (m x r) @ right (r x n), r at most m and n."""
    basis, triangle = torch.linalg.qr(right.T)
    return LowRank(left @ triangle.T, basis.T.contiguous())
