"""All layers together keep the density that was asked for: never more, and less by one step of a rank at most."""

import random

import pytest

from pifa_compile.compression.ranks import UniformBudget, plan_uniform
from pifa_compile.factors import density_of_rank, numbers, rank_for_density

SHAPES = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]


def kept_and_dense(shapes, ranks, form="pifa"):
    """Numbers of the layers that are replaced, after and before."""
    taken = [(m, n, r) for (m, n), r in zip(shapes, ranks, strict=True) if r]
    return sum(numbers(form, *layer) for layer in taken), sum(m * n for m, n, _ in taken)


@pytest.mark.parametrize("form", ["pifa", "pair"])
@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("density", [0.2, 0.35, 0.5, 0.8])
def test_the_plan_keeps_the_density_within_one_step(density, multiple, form):
    for seed in range(5):
        draw = random.Random(seed)
        shapes = [(draw.randrange(64, 400), draw.randrange(64, 400)) for _ in range(draw.randrange(1, 12))]
        ranks = plan_uniform(shapes, density, multiple, form)
        kept, dense = kept_and_dense(shapes, ranks, form)
        step = max(multiple * (m + n) for m, n in shapes)  # no rank step costs more
        assert all(ranks)
        assert density * dense - step < kept <= density * dense * (1 + 1e-9)


def test_equal_layers_alternate_between_two_ranks():
    ranks = plan_uniform([(300, 500)] * 40, 0.5, 16)
    lower = rank_for_density(300, 500, 0.5, 16)
    assert set(ranks) == {lower, lower + 16}
    kept, dense = kept_and_dense([(300, 500)] * 40, ranks)
    without = density_of_rank(300, 500, lower)
    assert 0.5 - kept / dense < (0.5 - without) / 10, "what rounding left was not given to other layers"


@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_ranks_are_multiples_and_near_the_layers_own(density):
    for (m, n), r in zip(SHAPES * 3, plan_uniform(SHAPES * 3, density, 16), strict=True):
        own = rank_for_density(m, n, density, 16)
        assert r % 16 == 0
        assert own <= r <= own + 16


def test_a_layer_too_small_for_the_multiple_is_not_spared():
    assert plan_uniform([(12, 12)], 0.5, 16) == [rank_for_density(12, 12, 0.5, 1)]
    assert rank_for_density(12, 12, 0.5, 1) > 0


def test_a_small_layer_gets_no_windfall_from_a_large_one():
    large, small = (1000, 1000), (10, 10)
    own = rank_for_density(*small, 0.5, 1)
    for density in (0.5, 0.5001, 0.501, 0.505):
        _, *rest = plan_uniform([large, small, small], density, 16)
        assert all(own <= r <= own + 1 for r in rest)


@pytest.mark.parametrize("density", [0.5, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_a_rank_always_saves_numbers(density, form):
    shapes = [(64, 64), (20, 90), (5, 5), (2, 3), (90, 20), (64, 64)] * 3
    for (m, n), r in zip(shapes, plan_uniform(shapes, density, 8, form), strict=True):
        assert r == 0 or numbers(form, m, n, r) < m * n


def test_a_layer_that_stays_dense_costs_the_others_nothing():
    tiny = (2, 2)  # rank 1 keeps 4 of 4 numbers
    alone = plan_uniform(SHAPES, 0.5)
    assert plan_uniform([tiny, *SHAPES], 0.5) == [0, *alone]
    budget = UniformBudget.over([tiny, *SHAPES], 0.5, 16)
    budget.leave_dense(*tiny)
    assert budget.quota(384, 384) == 0.5 * 384 * 384
    assert budget.remaining == sum(m * n for m, n in SHAPES)


def test_what_a_layer_cannot_use_goes_to_all_after_it():
    shapes = [(200, 200)] * 11
    budget = UniformBudget.over(shapes, 0.5, 1)
    budget.spend(200, 200, numbers("pifa", 200, 200, 3), exhausted=True)
    left = 0.5 * 200 * 200 - numbers("pifa", 200, 200, 3)
    assert budget.density == pytest.approx(0.5 + left / (10 * 200 * 200))
    kept, ranks = numbers("pifa", 200, 200, 3), []
    for m, n in shapes[1:]:
        ranks.append(budget.rank(m, n))
        kept += numbers("pifa", m, n, ranks[-1])
        budget.spend(m, n, numbers("pifa", m, n, ranks[-1]))
    assert max(ranks) - min(ranks) <= 1
    assert 0.5 * 11 * 200 * 200 - 400 < kept <= 0.5 * 11 * 200 * 200


def test_nothing_after_the_last_layer_is_no_error():
    budget = UniformBudget.over([(20, 20)], 0.5, 1)
    budget.spend(20, 20, numbers("pifa", 20, 20, 1), exhausted=True)
    assert budget.remaining == 0
    assert budget.density == 0.5
