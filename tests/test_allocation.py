"""Ranks under a global budget: equal to brute force, never above the budget, dense where that is best."""

import itertools
import random

import pytest
import torch

from pifa_compile.compression.allocation import Option, allocate, allocate_choices, rank_options, tail_losses
from pifa_compile.factors import numbers


def brute_force(options, budget):
    fitting = (c for c in itertools.product(*options) if sum(o.numbers for o in c) <= budget)
    return min((sum(o.loss for o in c) for c in fitting), default=None)


@pytest.mark.parametrize("seed", range(20))
def test_it_equals_brute_force_on_four_layers_with_five_options(seed):
    random.seed(seed)
    options = [[Option(i, random.randint(1, 60), random.random()) for i in range(5)] for _ in range(4)]
    budget = random.randint(10, 200)
    found, least = allocate(options, budget), brute_force(options, budget)
    assert (found is None) == (least is None)
    if found is not None:
        assert sum(o.loss for o in found) == pytest.approx(least, abs=1e-12)
        assert sum(o.numbers for o in found) <= budget


@pytest.mark.parametrize("seed", range(20))
def test_layers_apart_or_joined_equal_brute_force(seed):
    """Two choices of layers that may be joined, and one of three with two overlapping pairs."""
    random.seed(seed)

    def parts(count):
        return [[Option(i, random.randint(1, 60), random.random()) for i in range(4)] for _ in range(count)]

    choices = [[parts(2), parts(1)], [parts(1)], [parts(3), parts(2), parts(2)]]
    budget = random.randint(10, 250)
    found = allocate_choices(choices, budget)
    least = min(
        (
            best
            for taken in itertools.product(*choices)
            if (best := brute_force([part for alternative in taken for part in alternative], budget)) is not None
        ),
        default=None,
    )
    assert (found is None) == (least is None)
    if found is not None:
        options = [option for _, chosen in found for option in chosen]
        assert sum(o.loss for o in options) == pytest.approx(least, abs=1e-12)
        assert sum(o.numbers for o in options) <= budget
        for alternatives, (taken, chosen) in zip(choices, found, strict=True):
            assert all(o in part for o, part in zip(chosen, alternatives[taken], strict=True))


@pytest.mark.parametrize("density", [0.3, 0.5625, 0.8])
@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_real_options_stay_within_the_budget_and_near_the_best(density, form):
    """Costs in the thousands are rounded up to bins; what that leaves is spent."""
    shapes = [(64, 64), (96, 40), (40, 96), (64, 64)]
    multiple = 16 if density > 0.5 else 8
    values = [torch.logspace(0, -k, min(shape)) for k, shape in enumerate(shapes)]
    options = [
        rank_options(m, n, tail_losses(s, min(m, n)), multiple, form) for (m, n), s in zip(shapes, values, strict=True)
    ]
    budget = density * sum(m * n for m, n in shapes)
    least = brute_force(options, budget)
    for bins in (8192, 256):
        found = allocate(options, budget, bins)
        assert sum(o.numbers for o in found) <= budget
        assert sum(o.loss for o in found) <= least * (1 + 1e-12 if bins == 8192 else 1.05) + 1e-12


def test_a_layer_may_be_left_dense():
    """The cost is concave: 60 of 64 ranks cost nearly as much as the dense layer."""
    flat, steep = torch.ones(64), torch.logspace(0, -6, 64)
    options = [rank_options(64, 64, tail_losses(s, 64), 1) for s in (flat, steep)]
    dense, small = allocate(options, 1.3 * 64 * 64)
    assert (dense.rank, dense.numbers, dense.loss) == (0, 64 * 64, 0.0)
    assert 0 < small.rank < 20


def test_options_are_what_saves_numbers():
    tail = tail_losses(torch.arange(64, 0, -1.0), 64)
    options = rank_options(64, 64, tail, 16)
    assert [o.rank for o in options] == [16, 32, 48, 0]
    assert [o.numbers for o in options] == [*(numbers("pifa", 64, 64, r) for r in (16, 32, 48)), 64 * 64]
    assert [o.rank for o in rank_options(64, 64, tail, 16, "pair")] == [16, 0]
    assert [o.rank for o in rank_options(8, 8, tail[-9:], 16)] == [1, 2, 3, 4, 5, 0], "too small for the multiple"
    assert [o.rank for o in rank_options(64, 64, tail[:33], 16)] == [16, 32, 0], "never above the true rank"
    assert [o.rank for o in rank_options(1, 8, [1.0, 0.0], 1)] == [0], "not even rank 1 saves a number"
    many = rank_options(4096, 4096, [0.0] * 4097, 1, most=100)
    assert len(many) <= 101
    assert numbers("pifa", 4096, 4096, many[-2].rank + 1) >= 4096 * 4096, "the largest rank that saves is kept"


def test_tails_are_sums_of_squares():
    assert tail_losses(torch.tensor([3.0, 2.0, 1.0]), 3) == [14.0, 5.0, 1.0, 0.0]
    assert tail_losses(torch.tensor([3.0, 2.0, 0.0]), 2) == [13.0, 4.0, 0.0]


def test_nothing_fits_a_budget_below_the_smallest_options():
    assert allocate([[Option(1, 10, 1.0)], [Option(1, 10, 1.0)]], 19) is None
    assert allocate([[Option(1, 10, 1.0)], [Option(1, 10, 1.0)]], 20) is not None
