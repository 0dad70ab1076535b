"""Properties that hold for any shape, rank and graph, tried on examples that hypothesis makes up."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile.compression.ranks import plan_uniform
from pifa_compile.factors import NUMBERS, flop_per_token, numbers, rank_for_density, rank_for_numbers
from pifa_compile.kernels.op import gather_order, linear
from pifa_compile.pivoting import LowRank, choose_pivots, low_rank_of_pair, pivot

sizes = st.integers(1, 40)
densities = st.floats(0.01, 0.99)
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def low_rank(m: int, n: int, r: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((m, r), (r, n)))
    return low_rank_of_pair(left, right)


@given(sizes, sizes, st.data())
def test_pivoted_never_needs_more_operations_than_the_pair_nor_more_numbers_past_the_row_order(m, n, data):
    r = data.draw(st.integers(1, min(m, n)))
    assert flop_per_token("pifa", m, n, r) <= min(flop_per_token("pair", m, n, r), flop_per_token("dense", m, n))
    assert numbers("pifa", m, n, r) - r <= min(numbers("pair", m, n, r), m * n)
    symbols = {str(s): s for s in NUMBERS["pifa"].free_symbols}
    assert numbers("pifa", m, n, r) == NUMBERS["pifa"].subs({symbols["m"]: m, symbols["n"]: n, symbols["r"]: r})


@given(sizes, sizes, densities, st.integers(1, 8))
def test_a_rank_for_a_density_fits_and_the_next_one_does_not(m, n, density, multiple):
    r = rank_for_density(m, n, density, multiple)
    assert r % multiple == 0 and 0 <= r <= min(m, n)
    assert r == 0 or numbers("pifa", m, n, r) <= density * m * n
    following = r + multiple
    assert following > min(m, n) or numbers("pifa", m, n, following) > density * m * n


@given(sizes, sizes, st.integers(0, 2000))
def test_the_rank_grows_with_the_budget(m, n, budget):
    assert rank_for_numbers(m, n, budget) <= rank_for_numbers(m, n, budget + 1)


@given(st.lists(st.tuples(st.integers(8, 400), st.integers(8, 400)), min_size=1, max_size=12), densities)
def test_planned_ranks_together_keep_no_more_than_the_density(shapes, density):
    ranks = plan_uniform(shapes, density, 4)
    kept = sum(numbers("pifa", m, n, r) if r else m * n for (m, n), r in zip(shapes, ranks, strict=True))
    spared = sum(m * n for (m, n), r in zip(shapes, ranks, strict=True) if not r)
    own = sum(numbers("pifa", m, n, 1) for m, n in shapes)  # a layer gets rank 1 from its own share if nothing else
    assert kept - spared <= density * sum(m * n for m, n in shapes) + own


@few
@given(sizes, sizes, st.data(), st.sampled_from(["maxvol", "qr", "lu"]), st.integers(0, 10**6))
def test_pivoting_keeps_the_weight_and_its_own_rows(m, n, data, pivoting, seed):
    r = data.draw(st.integers(1, min(m, n)))
    weight = low_rank(m, n, r, seed)
    assert weight.rank == r
    pivots = choose_pivots(weight.coordinates, pivoting)
    assert pivots.unique().numel() == r and torch.equal(pivots, pivots.sort().values)
    factors, error = pivot(weight, pivots, torch.float64)
    exact = weight.weight()
    assert float((factors.weight() - exact).norm() / exact.norm()) < 1e-8
    assert error < 1e-8
    assert torch.equal(factors.row_order[:r].long(), pivots)
    factors.validate()


@few
@given(sizes, sizes, st.data(), st.integers(0, 10**6))
def test_the_operator_is_the_linear_layer_of_its_factors(m, n, data, seed):
    r, tokens = data.draw(st.integers(1, min(m, n))), data.draw(st.integers(0, 5))
    weight = low_rank(m, n, r, seed)
    factors, _ = pivot(weight, choose_pivots(weight.coordinates), torch.float64)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = linear(x, factors.pivot_rows, factors.coefficients, factors.row_order)
    assert torch.allclose(y, x @ weight.weight().T, atol=1e-6)
    assert torch.equal(gather_order(factors.row_order), factors.gather_order)


layers = st.lists(
    st.tuples(st.integers(2, 24), st.booleans(), st.sampled_from(["linear", "matmul", "addmm"])), min_size=1, max_size=4
)


class Chain(nn.Module):
    """Linear layers of any size and form, one after the other, some with a ReLU behind."""

    def __init__(self, width: int, parts: list[tuple[int, bool, str]]) -> None:
        super().__init__()
        self.parts = parts
        for i, (out, _, form) in enumerate(parts):
            shape = (out, width) if form == "linear" else (width, out)
            self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.randn(out)))
            width = out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, (_, relu, form) in enumerate(self.parts):
            weight, bias = getattr(self, f"weight{i}"), getattr(self, f"bias{i}")
            if form == "linear":
                x = nn.functional.linear(x, weight, bias)
            else:
                x = x @ weight if form == "matmul" else torch.addmm(bias, x, weight)
            x = torch.relu(x) if relu else x
        return x


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(2, 24), layers, st.integers(1, 5))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_graphs_of_any_linear_layers_keep_their_meaning(width, parts, tokens):
    """Without a run nothing but exact pairs may change, and whatever changes gives the same outputs."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Chain(width, parts).eval()
    x = torch.randn(tokens, width)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        y = torch.compile(model, backend="pifa", options={"inner": "eager", "store": folder})(x)
        exact = model.double()(x.double())
    assert counters["pifa"]["matched"] == len(parts)
    assert torch.allclose(y.double(), exact, atol=1e-3 * float(exact.abs().max() + 1))


def test_public_names_are_importable():
    for name in pifa_compile.__all__:
        assert getattr(pifa_compile, name) is not None
