"""Second moments: sums over tokens in float64, whatever the batches and the dtype."""

import pytest
import torch

from pifa_compile.compression.moments import CHUNK, GradientMoments, SecondMoments
from pifa_compile.errors import WeightError


def test_moments_are_sums_over_tokens_of_both_flows():
    x, z = torch.randn(CHUNK + 100, 12), torch.randn(CHUNK + 100, 12)
    found = SecondMoments.zeros(12, two_flows=True)
    for part, dense in zip(x.split(700), z.split(700), strict=True):
        found.add(part, dense)
    assert found.count == CHUNK + 100
    assert torch.allclose(found.gram, x.double().T @ x.double(), rtol=1e-12, atol=1e-9)
    assert torch.allclose(found.cross, z.double().T @ x.double(), rtol=1e-12, atol=1e-9)
    wanted = 0.25 * (z - x).double().T @ x.double()
    assert torch.allclose(found.drift(0.25), wanted, rtol=1e-5, atol=1e-3)


def test_one_flow_does_not_drift():
    x = torch.randn(50, 4)
    found = SecondMoments.zeros(4)
    found.add(x)
    assert found.drift(0.25) is None
    both = SecondMoments.zeros(4, two_flows=True)
    both.add(x, x)
    assert both.drift(0.0) is None
    assert float(both.drift(0.25).abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_dtypes_do_not_overflow(dtype):
    x = (300 * torch.randn(2000, 6)).to(dtype)
    found = SecondMoments.zeros(6)
    found.add(x)
    assert torch.equal(found.gram, x.double().T @ x.double())
    found.check("layer")


def test_inputs_that_are_not_finite_are_named():
    found = SecondMoments.zeros(3)
    found.add(torch.tensor([[1.0, float("inf"), 0.0]]))
    with pytest.raises(WeightError, match=r"model\.fc: its inputs .* infinite or NaN; skip the layer"):
        found.check("model.fc")


def test_gradient_moments_are_means_in_full_or_diagonal_form():
    g = torch.randn(3, 40, 5)
    full, diagonal = GradientMoments(5), GradientMoments(5, "diagonal")
    for moments in (full, diagonal):
        moments.add(g[:1])
        moments.add(g[1:])
        assert moments.samples == 120
    rows = g.reshape(-1, 5).double()
    assert torch.allclose(full.mean(), rows.T @ rows / 120)
    assert torch.allclose(diagonal.mean(), full.mean().diagonal())
    assert float(GradientMoments(5).mean().abs().max()) == 0, "no sample, no division by zero"
