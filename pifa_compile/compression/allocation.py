"""Ranks where the loss is: one budget over all layers, spent by dynamic programming.

m = out_features, n = in_features, r = rank. The squared singular values of S^T W L (S S^T the gradient moments of the
outputs, L L^T the moments of the inputs) are, up to one factor for the whole model, the second-order estimate of the
loss that truncating a component costs; so they compare across layers. The cost of a rank, r (m + n - r) + r, is concave
in r: the last components of a layer are the cheapest ones, so spending greedily component by component is wrong, and
leaving a layer dense is one of the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pifa_compile.factors import Form, numbers

#: The budget is divided into this many bins; costs are rounded up to whole bins, so the budget is never exceeded.
BINS = 8192
#: Options of one layer at most; above it ranks are thinned out evenly.
MOST_OPTIONS = 256


@dataclass(frozen=True)
class Option:
    """One way to keep a layer: at ``rank`` (0: dense), for so many numbers, at such a loss."""

    rank: int
    numbers: int
    loss: float


def rank_options(
    m: int, n: int, tail: Sequence[float], multiple: int = 16, form: Form = "pifa", most: int = MOST_OPTIONS
) -> list[Option]:
    """The options of an m x n layer: every ``multiple`` of ranks that saves numbers, and dense.

    tail  entry r is the loss of rank r; it ends at the numerical rank, from where the loss is the same

    A layer too small for the multiple has every rank. Ranks above the numerical rank are no options.
    """
    last = len(tail) - 1
    step = multiple if multiple <= min(last, min(m, n) - 1) else 1
    fitting = [r for r in range(step, last + 1, step) if numbers(form, m, n, r) < m * n]
    stride = -(-len(fitting) // most) or 1
    kept = fitting[::-1][::stride][::-1]
    return [Option(r, numbers(form, m, n, r), float(tail[r])) for r in kept] + [Option(0, m * n, 0.0)]


def tail_losses(singular_values: Tensor, rank: int) -> list[float]:
    """Entry r, from 0 to ``rank``, is the sum of the squared singular values (descending) after the first r."""
    squared = singular_values.double().square()
    total = squared.flip(0).cumsum(0).flip(0)
    return [*total.tolist(), 0.0][: rank + 1]


def allocate(options: Sequence[Sequence[Option]], budget: float, bins: int = BINS) -> list[Option] | None:
    """One option per layer with the least sum of losses, for at most ``budget`` numbers; None where nothing fits.

    Exact for costs that are whole bins (budget / bins numbers, 1 at least); else what rounding up to bins left over is
    spent afterwards on the layers where it gains most.
    """
    size = max(1.0, budget / bins)
    capacity = int(budget / size)
    best = np.zeros(capacity + 1)
    choices = []
    for layer in options:
        best, choice = _add_layer(best, layer, size)
        choices.append(choice)
    if not np.isfinite(best[capacity]):
        return None
    place, chosen = capacity, []
    for layer, choice in zip(reversed(options), reversed(choices), strict=True):
        option = layer[int(choice[place])]
        chosen.append(option)
        place -= _bins(option, size)
    return _spend_rest(options, chosen[::-1], budget)


def _bins(option: Option, size: float) -> int:
    return int(np.ceil(option.numbers / size - 1e-9))


def _add_layer(best: np.ndarray, layer: Sequence[Option], size: float) -> tuple[np.ndarray, np.ndarray]:
    """The least loss within each number of bins with one layer more, and the option that reaches it."""
    found = np.full_like(best, np.inf)
    choice = np.zeros(len(best), dtype=np.int32)
    for index, option in enumerate(layer):
        cost = _bins(option, size)
        if cost >= len(best):
            continue
        loss = best[: len(best) - cost] + option.loss
        better = loss < found[cost:]
        found[cost:][better] = loss[better]
        choice[cost:][better] = index
    return found, choice


def _spend_rest(options: Sequence[Sequence[Option]], chosen: list[Option], budget: float) -> list[Option]:
    left = budget - sum(option.numbers for option in chosen)
    while True:
        gains = [
            ((now.loss - option.loss) / (option.numbers - now.numbers), place, option)
            for place, (layer, now) in enumerate(zip(options, chosen, strict=True))
            for option in layer
            if 0 < option.numbers - now.numbers <= left and option.loss < now.loss
        ]
        if not gains:
            return chosen
        _, place, option = max(gains, key=lambda gain: gain[:2])
        left -= option.numbers - chosen[place].numbers
        chosen[place] = option
