"""Square roots of second moments: exact where they are regular, invertible where they are not."""

import pytest
import torch

from pifa_compile.compression.whitening import whiten


def gram_of(x):
    return x.double().T @ x.double()


def check(found, relative):
    """The factor is a root of ``gram``, and both ways to divide by it undo it."""
    identity = torch.eye(found.gram.shape[0], dtype=torch.float64)
    assert torch.isfinite(found.factor).all()
    scale = found.gram.diagonal().sqrt()
    error = (found.factor @ found.factor.T - found.gram) / scale / scale[:, None]
    assert float(error.abs().max()) < 1e-12
    assert relative(found.remove(found.apply(identity)), identity) < 1e-5
    assert relative(found.project(found.gram), found.factor) < 1e-5


def test_regular_moments_are_whitened_as_they_are(relative):
    gram = gram_of(torch.randn(500, 20))
    found = whiten(gram, 500)
    assert found.rank == 20
    assert found.scales is None
    assert relative(found.gram, gram) < 1e-7
    check(found, relative)


@pytest.mark.parametrize("count", [1, 7, 19])
def test_fewer_tokens_than_inputs_give_the_rank_that_is_there(relative, count):
    gram = gram_of(torch.randn(count, 20))
    for given in (count, None):
        found = whiten(gram, given)
        assert found.rank == count
        check(found, relative)
        assert relative(found.gram, gram) < 1e-6


def test_dependent_inputs_are_found_without_being_told(relative):
    x = torch.randn(500, 20, dtype=torch.float64)
    x[:, 7] = x[:, 3] - 2 * x[:, 5]
    found = whiten(gram_of(x), 500)
    assert found.rank == 19
    check(found, relative)


def test_dead_inputs_keep_a_small_weight(relative):
    x = torch.randn(500, 20)
    x[:, [2, 11]] = 0
    found = whiten(gram_of(x), 500)
    assert found.rank == 18
    check(found, relative)
    assert 0 < float(found.gram[2, 2]) < 1e-4


@pytest.mark.parametrize("tokens", [12, 500])
def test_an_input_that_is_all_but_dead_does_no_harm(relative, tokens):
    """A weight that is whitened, cut to the rank of the tokens and taken back has the outputs and the size it had."""
    x = torch.randn(tokens, 20)
    x[:, 3] *= 1e-30
    found = whiten(gram_of(x), tokens)
    check(found, relative)
    assert found.rank == min(tokens, 19)
    weight = torch.randn(8, 20, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(found.apply(weight), full_matrices=False)
    made = found.remove((u[:, :7] * s[:7]) @ vh[:7])
    assert made.norm() < 2 * weight.norm()
    assert relative(x.double() @ made.T, x.double() @ weight.T) < 0.6


def test_inputs_that_are_all_dead_count_alike(relative):
    found = whiten(torch.zeros(6, 6, dtype=torch.float64), 100)
    assert found.rank == 0
    assert torch.equal(found.gram, torch.eye(6, dtype=torch.float64))
    check(found, relative)


def test_an_outlier_channel_changes_nothing_for_the_others(relative):
    x = torch.randn(500, 20)
    before = whiten(gram_of(x), 500)
    loud = x.clone()
    loud[:, 0] *= 1e4
    after = whiten(gram_of(loud), 500)
    assert after.rank == 20
    check(after, relative)
    assert relative(after.gram[1:, 1:], before.gram[1:, 1:]) < 1e-12


def test_the_number_of_tokens_does_not_change_the_ridge(relative):
    gram = gram_of(torch.randn(500, 20))
    few, many = whiten(gram, 500), whiten(1e6 * gram, 500_000_000)
    assert relative(many.gram, 1e6 * few.gram) < 1e-14
