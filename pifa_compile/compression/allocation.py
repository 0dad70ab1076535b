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


#: Ways to keep some layers, e.g. apart or joined: each a list of parts, each part a list of options.
Alternatives = Sequence[Sequence[Sequence[Option]]]


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

    As ``allocate_choices`` where no layers may be joined.
    """
    found = allocate_choices([[[layer]] for layer in options], budget, bins)
    return None if found is None else [chosen[0] for _, chosen in found]


def allocate_choices(
    choices: Sequence[Alternatives], budget: float, bins: int = BINS
) -> list[tuple[int, list[Option]]] | None:
    """For every choice the alternative taken and one option for each of its parts; None where nothing fits.

    A choice is among alternatives, e.g. two layers apart or joined; an alternative is a list of parts, each with its
    options. The sum of losses is the least for at most ``budget`` numbers, exactly so for costs that are whole bins
    (budget / bins numbers, 1 at least); else what rounding up to bins left over is spent afterwards on the parts where
    it gains most.
    """
    size = max(1.0, budget / bins)
    capacity = int(budget / size)
    best = np.zeros(capacity + 1)
    steps = []
    for alternatives in choices:
        best, step = _add_choice(best, alternatives, size)
        steps.append(step)
    if not np.isfinite(best[capacity]):
        return None
    place, found = capacity, []
    for alternatives, step in zip(reversed(choices), reversed(steps), strict=True):
        taken = int(step.taken[place])
        parts: list[Option] = []
        for part, choice in zip(reversed(alternatives[taken]), reversed(step.parts[taken]), strict=True):
            option = part[int(choice[place])]
            parts.append(option)
            place -= _bins(option, size)
        found.append((taken, parts[::-1]))
    return _spend_rest(choices, found[::-1], budget)


@dataclass(frozen=True)
class _Step:
    """One choice, per number of bins: the best alternative, and within each alternative the option of each part."""

    taken: np.ndarray
    parts: list[list[np.ndarray]]


def _bins(option: Option, size: float) -> int:
    return int(np.ceil(option.numbers / size - 1e-9))


def _add_choice(best: np.ndarray, alternatives: Alternatives, size: float) -> tuple[np.ndarray, _Step]:
    """The least loss within each number of bins with one choice more."""
    reached, parts = [], []
    for alternative in alternatives:
        after, chosen = best, []
        for part in alternative:
            after, choice = _add_part(after, part, size)
            chosen.append(choice)
        reached.append(after)
        parts.append(chosen)
    taken = np.argmin(reached, axis=0).astype(np.int32)
    return np.min(reached, axis=0), _Step(taken, parts)


def _add_part(best: np.ndarray, options: Sequence[Option], size: float) -> tuple[np.ndarray, np.ndarray]:
    """The least loss within each number of bins with one part more, and the option that reaches it."""
    found = np.full_like(best, np.inf)
    choice = np.zeros(len(best), dtype=np.int32)
    for index, option in enumerate(options):
        cost = _bins(option, size)
        if cost >= len(best):
            continue
        loss = best[: len(best) - cost] + option.loss
        better = loss < found[cost:]
        found[cost:][better] = loss[better]
        choice[cost:][better] = index
    return found, choice


def _spend_rest(
    choices: Sequence[Alternatives], chosen: list[tuple[int, list[Option]]], budget: float
) -> list[tuple[int, list[Option]]]:
    left = budget - sum(option.numbers for _, parts in chosen for option in parts)
    while True:
        gains = [
            ((now.loss - option.loss) / (option.numbers - now.numbers), place, index, option)
            for place, (alternatives, (taken, parts)) in enumerate(zip(choices, chosen, strict=True))
            for index, (part, now) in enumerate(zip(alternatives[taken], parts, strict=True))
            for option in part
            if 0 < option.numbers - now.numbers <= left and option.loss < now.loss
        ]
        if not gains:
            return chosen
        _, place, index, option = max(gains, key=lambda gain: gain[:3])
        left -= option.numbers - chosen[place][1][index].numbers
        chosen[place][1][index] = option
