"""The data-free method: truncated singular value decomposition (Eckart and Young 1936)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pifa_compile.pivoting import LowRank, numerical_rank, svd_of


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of one weight, to be cut at any rank."""

    u: Tensor
    s: Tensor
    vh: Tensor

    @property
    def rank(self) -> int:
        """The numerical rank of the weight."""
        return numerical_rank(self.s, self.u.shape[0], self.vh.shape[1])

    def truncate(self, r: int) -> LowRank:
        """The nearest weight of rank r in the Frobenius norm."""
        return LowRank(self.u[:, :r] * self.s[:r], self.vh[:r])

    def truncation_error(self, r: int) -> float:
        """Relative Frobenius error of that weight against the original."""
        return float(self.s[r:].double().norm() / self.s.double().norm())


def spectrum(weight: Tensor, layer: str = "") -> Spectrum:
    """The spectrum of a weight (m x n); raises WeightError naming the layer if it is zero or not finite."""
    return Spectrum(*svd_of(weight, layer))
