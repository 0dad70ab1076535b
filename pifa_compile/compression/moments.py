"""Second moments of what linear layers read and of the loss gradient at what they write, accumulated in float64.

m = out_features, n = in_features, N = number of tokens. Rows of a batch are tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pifa_compile.errors import WeightError

#: Rows converted to float64 at a time, which bounds the copies to 0.36 GB at n = 11008.
CHUNK = 4096
#: Tokens are few for a layer if they are fewer than this fraction of its inputs.
FEW = 0.5


@dataclass(eq=False)
class SecondMoments:
    """Sums over tokens of a layer's inputs.

    gram   G = sum x x^T (n x n), x what the layer reads in the flow that it is fitted to
    cross  sum z x^T (n x n), z what it reads in the dense flow; None where both flows are one
    count  N, the tokens that were added
    """

    gram: Tensor
    cross: Tensor | None = None
    count: int = 0

    @classmethod
    def zeros(cls, n: int, *, two_flows: bool = False, device: torch.device | str = "cpu") -> SecondMoments:
        """Moments of n inputs before any token."""
        return cls(_zeros(n, device), _zeros(n, device) if two_flows else None)

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add tokens x (... x n) and, with two flows, the same tokens in the dense flow."""
        rows = x.detach().reshape(-1, x.shape[-1])
        others = None if dense is None else dense.detach().reshape(rows.shape)
        self.count += rows.shape[0]
        for start in range(0, rows.shape[0], CHUNK):
            part = rows[start : start + CHUNK].double()
            self.gram.addmm_(part.T, part)
            if self.cross is not None and others is not None:
                self.cross.addmm_(others[start : start + CHUNK].double().T, part)

    def drift(self, mixing: float) -> Tensor | None:
        """``mixing`` (cross - gram), n x n: W times it is what a target mixed from both flows adds to W G."""
        return None if self.cross is None or mixing == 0 else mixing * (self.cross - self.gram)

    def take_gram(self) -> Tensor:
        """G, which is not kept here any longer."""
        gram, self.gram = self.gram, self.gram.new_empty(0, 0)
        return gram

    def drift_(self, mixing: float) -> Tensor | None:
        """``drift`` in the place of ``cross``, which is gone."""
        cross, self.cross = self.cross, None
        return None if cross is None or mixing == 0 else cross.sub_(self.gram).mul_(mixing)

    def check(self, layer: str) -> None:
        """Raise WeightError unless all sums are finite."""
        sums = [self.gram] if self.cross is None else [self.gram, self.cross]
        if not all(bool(torch.isfinite(t).all()) for t in sums):
            cure = "skip the layer, or compress the model in a dtype that does not overflow"
            raise WeightError(layer, "its inputs on the calibration text are infinite or NaN", cure)


@dataclass(eq=False)
class GradientMoments:
    """Sums over tokens of the loss gradient g (m numbers) at a layer's output.

    form     "full" keeps sum g g^T (m x m), "diagonal" its diagonal (m)
    samples  how many gradients were added
    """

    m: int
    form: str = "full"
    device: torch.device | str = "cpu"
    samples: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.m, self.m) if self.form == "full" else (self.m,)
        self.total = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, gradient: Tensor) -> None:
        """Add gradients (... x m)."""
        rows = gradient.detach().reshape(-1, self.m)
        self.samples += rows.shape[0]
        for part in rows.split(CHUNK):
            wide = part.double()
            if self.form == "full":
                self.total.addmm_(wide.T, wide)
            else:
                self.total += wide.square().sum(0)

    def mean(self) -> Tensor:
        """H = E[g g^T] (m x m), or its diagonal (m)."""
        return self.total / max(self.samples, 1)

    def mean_(self) -> Tensor:
        """``mean`` in the place of the sums, which are gone: there is room for one m x m matrix only."""
        return self.total.div_(max(self.samples, 1))


def _zeros(n: int, device: torch.device | str) -> Tensor:
    return torch.zeros(n, n, dtype=torch.float64, device=device)
