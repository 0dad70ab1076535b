"""Ranks under a budget: one density for all layers, with what rounding leaves passed on.

m = out_features, n = in_features, r = rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pifa_compile.factors import Form, numbers, rank_for_numbers


@dataclass
class UniformBudget:
    """Hands out ranks layer by layer so that all that are replaced together keep ``density`` of their numbers.

    What rounding down leaves of one layer is carried to the next, so equal layers alternate between the two nearest
    ranks. What a layer cannot use at all (its true rank is lower) raises the density of all layers after it. A layer
    that stays dense counts neither before nor after.

    remaining  the dense numbers of the layers still to come
    """

    density: float
    remaining: int
    multiple: int = 16
    form: Form = "pifa"
    carry: float = 0.0

    @classmethod
    def over(
        cls, shapes: Sequence[tuple[int, int]], density: float, multiple: int, form: Form = "pifa"
    ) -> UniformBudget:
        """A budget for layers of the given (m, n), in the order in which they will ask."""
        return cls(density, sum(m * n for m, n in shapes), multiple, form)

    def quota(self, m: int, n: int) -> float:
        """How many numbers the next layer, m x n, may keep."""
        return self.density * m * n + self.carry

    def rank(self, m: int, n: int) -> int:
        """The rank that the quota of the next layer, m x n, allows, always one that saves numbers.

        A layer too small for the rank multiple gets the largest rank that fits: an explicit density spares no layer. It
        is 0 only where not even rank 1 fits.
        """
        quota = min(self.quota(m, n), m * n - 1)
        r = 0
        for step in (self.multiple, 1):
            own = rank_for_numbers(m, n, self.density * m * n, step, self.form)
            # One step above it at most: the remainder of a large layer would lift a small one far above its peers.
            r = r or min(rank_for_numbers(m, n, quota, step, self.form), own + step)
        return r

    def leave_dense(self, m: int, n: int) -> None:
        """Book that the layer m x n is not replaced."""
        self.remaining -= m * n

    def spend(self, m: int, n: int, kept: int, exhausted: bool = False) -> None:
        """Book the numbers that the layer m x n keeps; ``exhausted`` when more would have been of no use to it."""
        left = self.quota(m, n) - kept
        self.remaining -= m * n
        self.carry = left
        if exhausted and left > 0 and self.remaining > 0:
            self.density = min(1.0, self.density + left / self.remaining)
            self.carry = 0.0


def plan_uniform(
    shapes: Sequence[tuple[int, int]], density: float, multiple: int = 16, form: Form = "pifa"
) -> list[int]:
    """The ranks of layers of full rank with the given (m, n), before any weight has been looked at."""
    budget = UniformBudget.over(shapes, density, multiple, form)
    ranks = []
    for m, n in shapes:
        r = budget.rank(m, n)
        if r:
            budget.spend(m, n, numbers(form, m, n, r))
        else:
            budget.leave_dense(m, n)
        ranks.append(r)
    return ranks
