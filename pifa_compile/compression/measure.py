"""What replacing a weight does to a layer's outputs, from the second moments of what the layer reads.

m = out_features, n = in_features. Everything is squared norms, so that no square root of the moments, and nothing
larger than the smaller of m x m and n x n beside the moments, is needed; relative errors below 1e-7 are lost in that.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of a weight that are float64 at a time.
ROWS = 4096


class Measure:
    """Relative errors of a layer's outputs on moments G = X X^T (n x n, float64): that of a weight, and the least."""

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram
        self._root: Tensor | None = None

    def __call__(self, matrix: Tensor, made: Tensor, r: int) -> tuple[float, float]:
        """||(made - W) X|| / ||W X||, and the least that any weight of rank r reaches (Eckart and Young 1936)."""
        powers = self._powers(matrix)
        total = float(powers.sum())
        if total <= 0:
            return 0.0, 0.0
        lost = 0.0
        for before, after in zip(matrix.split(ROWS), made.split(ROWS), strict=True):
            error = after.to(self._gram) - before
            lost += float(torch.dot((error @ self._gram).flatten(), error.flatten()))
        least = float(powers[: len(powers) - r].sum()) if r else total
        return (max(lost, 0.0) / total) ** 0.5, (least / total) ** 0.5

    def _powers(self, matrix: Tensor) -> Tensor:
        """Squared singular values of W X, ascending."""
        m, n = matrix.shape
        if m <= n:
            wide = matrix.double()
            square = (wide @ self._gram) @ wide.T
        else:
            root = self._square_root()
            square = root.new_zeros(n, n)
            for part in matrix.split(ROWS):
                outputs = part.double() @ root
                square.addmm_(outputs.T, outputs)
        powers: Tensor = torch.linalg.eigvalsh(square)
        return powers.clamp_min(0)

    def _square_root(self) -> Tensor:
        """R of R R^T = G; layers that read the same inputs share it."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self._gram)
            self._root = vectors * values.clamp_min(0).sqrt()
        return self._root
