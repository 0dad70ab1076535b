"""The solvers against float64 oracles: optimal, equal where they must be, never worse than the published one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pifa_compile.compression.moments import SecondMoments
from pifa_compile.compression.mpifa import (
    OutputWeighting,
    alternating,
    closed_form,
    objective,
    output_weighting,
    whitened_target,
)
from pifa_compile.compression.whitening import whiten


def problem(m=24, n=16, count=200, seed=0, noise=0.3):
    """A weight, its inputs in two flows (rows are tokens), their moments and whitening."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=g, dtype=torch.float64)
    x = torch.randn(count, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)
    dense = x + noise * torch.randn(count, n, generator=g, dtype=torch.float64)
    moments = SecondMoments.zeros(n, two_flows=True)
    moments.add(x, dense)
    return weight, x, dense, moments, whiten(moments.gram, count)


def gradient_root(m, form, seed=1):
    g = torch.randn(300, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h = (g * torch.logspace(0, 2, m)).T @ (g * torch.logspace(0, 2, m)) / 300
    return {"full": h, "diagonal": h.diagonal(), "none": None}[form]


def test_without_weighting_and_drift_it_is_the_whitened_svd(relative):
    weight, x, _, _, whitening = problem()
    found = closed_form(whitened_target(weight, whitening), whitening).truncate(5)
    outputs = x @ weight.T
    u, s, vh = torch.linalg.svd(outputs, full_matrices=False)
    assert relative(x @ found.weight().T, u[:, :5] * s[:5] @ vh[:5]) < 1e-6
    assert relative(found.basis @ found.basis.T, torch.eye(5)) < 1e-12


@pytest.mark.parametrize("form", ["full", "diagonal", "none"])
def test_the_target_is_reached_at_full_rank(relative, form):
    """Without a limit on the rank, it is the least-squares fit to the mixed outputs."""
    weight, x, dense, moments, whitening = problem()
    target = whitened_target(weight, whitening, moments.drift(0.25))
    fitted = closed_form(target, whitening, output_weighting(gradient_root(24, form)))
    outputs = (0.25 * dense + 0.75 * x) @ weight.T
    wanted = torch.linalg.lstsq(x, outputs).solution.T
    assert fitted.rank == 16
    assert relative(fitted.truncate(16).weight(), wanted) < 1e-6


@pytest.mark.parametrize("form", ["full", "diagonal", "none"])
def test_nothing_near_the_closed_form_is_better(form):
    weight, _, _, moments, whitening = problem()
    target = whitened_target(weight, whitening, moments.drift(0.5))
    weighting = output_weighting(gradient_root(24, form))
    best = closed_form(target, whitening, weighting).truncate(4)
    least = objective(best, target, whitening, weighting)
    for seed in range(20):
        step = 1e-3 * torch.randn(24, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = type(best)(best.coordinates + step, best.basis)
        assert objective(other, target, whitening, weighting) > least


def test_weighting_serves_the_outputs_that_count():
    weight, x, _, _, whitening = problem()
    powers = torch.full((24,), 1e-3, dtype=torch.float64)
    powers[3] = 1.0
    target = whitened_target(weight, whitening)
    errors = {}
    for name, h in {"weighted": powers, "plain": None}.items():
        made = closed_form(target, whitening, output_weighting(h, damping=0.0)).truncate(4).weight()
        errors[name] = float((x @ (made - weight).T)[:, 3].norm())
    assert errors["weighted"] < 0.2 * errors["plain"]


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(2, 20),
    n=st.integers(2, 20),
    count=st.integers(1, 60),
    mixing=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_closed_form_is_never_above_the_published_one(m, n, count, mixing, seed):
    weight, _, _, moments, whitening = problem(m, n, count, seed)
    target = whitened_target(weight, whitening, moments.drift(mixing))
    closed, published = closed_form(target, whitening), alternating(weight, target, whitening)
    for r in range(1, min(closed.rank, published.rank) + 1):
        ours = objective(closed.truncate(r), target, whitening)
        assert ours <= objective(published.truncate(r), target, whitening) * (1 + 1e-9) + 1e-9


def test_the_published_solver_follows_its_formulas(relative):
    weight, _, _, moments, whitening = problem()
    target = whitened_target(weight, whitening, moments.drift(0.25))
    gram = whitening.gram
    k = weight @ (gram + moments.drift(0.25))
    v = torch.linalg.svd(weight @ whitening.factor, full_matrices=False).Vh[:5] @ torch.linalg.inv(whitening.factor)
    u = k @ v.T @ torch.linalg.inv(v @ gram @ v.T)
    wanted = u @ torch.linalg.pinv(u) @ k @ torch.linalg.inv(gram)
    found = alternating(weight, target, whitening).truncate(5)
    assert relative(found.weight(), wanted) < 1e-6


def test_a_rank_above_the_true_one_is_found_out():
    """Published code rounds it up, and its normal equations become singular."""
    weight, _, _, moments, whitening = problem()
    weight = weight[:, :3] @ weight[:3]
    target = whitened_target(weight, whitening, moments.drift(0.25))
    assert closed_form(target, whitening).rank == 3
    assert alternating(weight, target, whitening).rank == 3
    for fitted in (closed_form(target, whitening), alternating(weight, target, whitening)):
        made = fitted.truncate(8)
        assert torch.isfinite(made.weight()).all()
        assert objective(made, target, whitening) < 1e-6


def test_directions_that_no_token_excites_keep_the_weight(relative):
    weight, _, _, moments, whitening = problem(n=16, count=6, noise=0.0)
    assert whitening.rank == 6
    full = closed_form(whitened_target(weight, whitening, moments.drift(0.25)), whitening).truncate(16)
    assert relative(full.weight(), weight) < 1e-3


def test_gradients_that_vanish_weigh_nothing():
    assert output_weighting(None).root is None
    assert output_weighting(torch.zeros(4, 4, dtype=torch.float64)).root is None
    assert output_weighting(torch.zeros(4, dtype=torch.float64)).root is None
    y = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(OutputWeighting().remove(OutputWeighting().apply(y)), y)


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_singular_gradient_moments_are_damped(relative, form):
    h = torch.zeros(6, 6, dtype=torch.float64)
    h[0, 0] = 3.0
    weighting = output_weighting(h if form == "full" else h.diagonal(), damping=0.1)
    y = torch.randn(6, 3, dtype=torch.float64)
    assert relative(weighting.remove(weighting.apply(y)), y) < 1e-12
    wanted = h + 0.1 * 0.5 * torch.eye(6)
    assert torch.allclose(weighting.apply(y).T @ weighting.apply(y), y.T @ wanted @ y)
