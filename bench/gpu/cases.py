"""What is measured: named layers, their ranks, and random factors with an exact product to compare with.

m = out_features, n = in_features, r = rank, N = tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pifa_compile.factors import PifaFactors, density_of_rank, rank_for_density

#: (m, n) of the linear layers of a block, and how many of each it has.
MODELS = {
    "Llama-2-7B": {"q, k, v, o": (4096, 4096, 4), "gate, up": (11008, 4096, 2), "down": (4096, 11008, 1)},
    "Llama-2-13B": {"q, k, v, o": (5120, 5120, 4), "gate, up": (13824, 5120, 2), "down": (5120, 13824, 1)},
    "Llama-3-8B": {
        "q, o": (4096, 4096, 2),
        "k, v": (1024, 4096, 2),
        "gate, up": (14336, 4096, 2),
        "down": (4096, 14336, 1),
    },
}
TINY = {"tiny": {"square": (64, 64, 4), "tall": (96, 64, 2)}}


@dataclass(frozen=True)
class Case:
    """One layer at one rank."""

    model: str
    layer: str
    m: int
    n: int
    r: int

    @property
    def density(self) -> float:
        return density_of_rank(self.m, self.n, self.r)

    def named(self) -> dict[str, object]:
        """The case as columns of a row."""
        return {
            "model": self.model,
            "layer": self.layer,
            "m": self.m,
            "n": self.n,
            "r": self.r,
            "density": self.density,
        }


def cases(models: dict[str, dict[str, tuple[int, int, int]]], density: float, multiple: int = 16) -> list[Case]:
    """A case per layer of the models, at the rank of a density."""
    return [
        Case(model, layer, m, n, rank_for_density(m, n, density, multiple))
        for model, layers in models.items()
        for layer, (m, n, _) in layers.items()
    ]


def squares(w: int, shares: tuple[float, ...], multiple: int = 16) -> list[Case]:
    """Square layers of width w at several ranks."""
    return [Case(f"square {w}", f"r = {share:g} w", w, w, int(share * w) // multiple * multiple) for share in shares]


def random_factors(
    case: Case, dtype: torch.dtype, device: str, coefficients: torch.dtype | None = None, group: int = 1
) -> PifaFactors:
    """Factors whose products are of unit size, with pivots spread over all rows, in aligned groups of ``group``."""
    m, n, r = case.m, case.n, case.r
    rows = torch.randn(r, n, device=device) / n**0.5
    c = torch.randn(m - r, r, device=device) / r**0.5
    chosen = group * torch.randperm(m // group, device=device)[:, None] + torch.arange(group, device=device)
    chosen = chosen.flatten()
    order = torch.cat([chosen[:r].sort().values, chosen[r:].sort().values])
    return PifaFactors(rows.to(dtype), c.to(coefficients or dtype), order.to(torch.int32))


def exact(factors: PifaFactors, x: Tensor) -> Tensor:
    """What the factors make of x, in float64."""
    y_p = x.double() @ factors.pivot_rows.double().T
    y = y_p.new_empty(x.shape[0], factors.shape[0])
    y[:, factors.row_order.long()] = torch.cat([y_p, y_p @ factors.coefficients.double().T], 1)
    return y


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of ``wanted``; infinite where there is no number."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return math.inf if math.isnan(error) else error
