"""Square roots of second moments: L L^T = G + ridge, made so that L can always be inverted.

n = number of inputs. Whitening a weight by its inputs: SVD-LLM (Wang et al., ICLR 2025). The ridge is relative to each
input's own power, so that neither the number of tokens nor one loud input changes what it does to the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Ridge, relative to each input's own power.
RIDGE = 1e-8
#: Correlations count as singular if their Cholesky factor, with this added, has a squared pivot below 100 times it.
SINGULAR = 1e-9
#: Eigenvalues of the correlations below this fraction of the largest count as zero, and are raised to it.
FLOOR = 1e-9
#: Power given to inputs that have less than that, as a fraction of the median power of those that have any. An input of
#: power 1e-60, which a layer norm may leave, must not become a weight of 1e30.
DEAD = 1e-8


@dataclass(frozen=True, eq=False)
class Whitening:
    """A square root L (n x n) of regularised second moments.

    factor  L: lower triangular, or S V R if ``scales`` are there, V orthogonal, S and R diagonal
    rank    how many directions the tokens span, as found
    scales  the diagonals of S^2 and R^2: L^-1 = R^-2 L^T S^-2
    """

    factor: Tensor
    rank: int
    scales: tuple[Tensor, Tensor] | None = None

    @property
    def gram(self) -> Tensor:
        """L L^T, the moments that L stands for, n x n; computed when asked for."""
        return self.factor @ self.factor.T

    def apply(self, weight: Tensor) -> Tensor:
        """W L (m x n): a matrix whose Frobenius norm is the norm of the layer's outputs."""
        return weight.to(self.factor.dtype) @ self.factor

    def remove(self, whitened: Tensor) -> Tensor:
        """B L^-1 (m x n)."""
        if self.scales is not None:
            left, right = self.scales
            return ((whitened / right) @ self.factor.T).div_(left)
        solved: Tensor = torch.linalg.solve_triangular(self.factor, whitened, upper=False, left=False)
        return solved

    def project(self, moment: Tensor) -> Tensor:
        """K L^-T (m x n) of a cross moment K = Y X^T."""
        if self.scales is not None:
            left, right = self.scales
            return ((moment / left) @ self.factor).div_(right)
        solved: Tensor = torch.linalg.solve_triangular(self.factor.T, moment, upper=True, left=False)
        return solved


def whiten(gram: Tensor, count: int | None = None, *, overwrite: bool = False) -> Whitening:
    """The whitening of second moments G (n x n, symmetric, float64) of ``count`` tokens.

    overwrite  G may be used as workspace. Nothing of its size beside it and the result is needed then, but for the
               workspace of the eigendecomposition where G is singular, twice its size

    Cholesky with a relative ridge; where G is singular (fewer tokens than inputs, a pivot that is all ridge, Cholesky
    failed) by eigendecomposition with a relative floor. Directions that no token excites keep a small weight, so that
    what the layer does to them is kept as far as it costs nothing. Zero moments are whitened as the identity.
    """
    n = gram.shape[0]
    power = gram.diagonal().clamp_min(0)
    if not bool(power.any()):
        return Whitening(torch.eye(n, dtype=gram.dtype, device=gram.device), 0)
    floor = DEAD * power[power > 0].median()
    live = power > floor
    scale = power.where(live, floor).sqrt()
    correlations = (gram if overwrite else gram.clone()).div_(scale).div_(scale[:, None])
    dead = int((~live).sum())
    factor = _triangle(correlations) if count is None or count >= n else None
    if factor is not None:
        return Whitening(factor.mul_(scale[:, None]), n - dead)
    return _by_eigenvalues(correlations, scale, dead)


def _triangle(correlations: Tensor) -> Tensor | None:
    """The Cholesky factor of correlations with the ridge, or None if they are singular. Changes their diagonal."""
    correlations.diagonal().fill_(1 + SINGULAR)
    factor, info = torch.linalg.cholesky_ex(correlations)
    if int(info) or float(factor.diagonal().min()) ** 2 < 100 * SINGULAR:
        return None
    del factor
    correlations.diagonal().fill_(1 + RIDGE)
    ridged: Tensor = torch.linalg.cholesky(correlations)
    return ridged


def _by_eigenvalues(correlations: Tensor, scale: Tensor, dead: int) -> Whitening:
    correlations.diagonal().fill_(1)
    values, vectors = torch.linalg.eigh(correlations)
    floor = FLOOR * values[-1]
    rank = int((values > floor).sum()) - dead  # a dead input is its own eigenvector, with value 1
    squares = values.clamp_min(floor)
    factor = vectors.mul_(squares.sqrt()).mul_(scale[:, None])
    return Whitening(factor, max(rank, 0), (scale.square(), squares))
