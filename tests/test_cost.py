"""Formulas of cost: bytes, operations, and times on a machine of known speed."""

from __future__ import annotations

import pytest
import torch

from pifa_compile import cost
from pifa_compile.factors import flop_per_token

MACHINE = cost.Profile("test", 1e10, {"float32": {1: 1e11}, "bfloat16": {1: 2e11}}, 1e9, 1e-5)


@pytest.mark.parametrize("form", ["dense", "pair", "pifa"])
def test_flop_are_those_of_the_factors(form):
    N, m, n, r = 7, 48, 32, 12
    total = sum(int(step.flop.subs({cost.TOKENS: N, cost.M: m, cost.N_IN: n, cost.R: r})) for step in cost.STEPS[form])
    assert total == N * flop_per_token(form, m, n, r)


def test_bytes_count_every_operand_once():
    N, m, n, r = 7, 48, 32, 12
    values = {cost.TOKENS: N, cost.M: m, cost.N_IN: n, cost.R: r, cost.ITEM: 2}
    first, second, gather = (int(step.bytes.subs(values)) for step in cost.STEPS["pifa"])
    tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((N, n), (r, n), (N, r))]
    assert first == sum(t.nbytes for t in tensors)
    tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((N, r), (m - r, r), (N, m - r))]
    assert second == sum(t.nbytes for t in tensors)
    assert gather == 2 * torch.empty(N, m, dtype=torch.bfloat16).nbytes


def test_time_is_the_slower_of_bytes_and_flop_and_a_call():
    # One token: 4 MB of weight at 10 GB/s. Many tokens: 2 N m n at 100 GFLOP/s.
    one = cost.time("dense", 1, 1000, 1000, 0, "float32", MACHINE)
    assert one == pytest.approx((4e6 + 8e3) / 1e10 + 1e-5)
    many = cost.time("dense", 1000, 1000, 1000, 0, "float32", MACHINE)
    assert many == pytest.approx(2e9 / 1e11 + 1e-5)
    assert cost.roof("dense", 1000, 1000, 1000, 0, "float32", MACHINE) == pytest.approx(2e9 / 1e11)
    folded, plain = (cost.time(f, 1000, 1000, 1000, 500, "float32", MACHINE) for f in ("pifa folded", "pifa"))
    assert plain - folded == pytest.approx(1e6 / 1e9 - 8e6 / 1e10)


def test_a_layer_in_one_call_takes_its_bytes_and_its_sums():
    N, m, n, r = 2, 1000, 800, 300
    moved, flop = 2 * (r * (m + n - r) + N * (m + n)), 2 * N * r * (m + n - r)
    for dtype, size, rate in (("float32", 2, 1e11), ("bfloat16", 1, 2e11)):
        taken = cost.time(cost.FEW_TOKENS, N, m, n, r, dtype, MACHINE)
        assert taken == pytest.approx(size * moved / 1e10 + flop / rate + 1e-5)
    assert cost.work(cost.FEW_TOKENS, N, m, n, r, "bfloat16") == (moved, flop)


def test_calls_decide_small_layers_and_flop_large_ones():
    forms = ("dense", "pair", "pifa")
    assert cost.fastest(forms, 1, 32, 32, 8, "float32", MACHINE) == "dense"
    assert cost.fastest(forms, 512, 4096, 4096, 2048, "float32", MACHINE) == "pifa"


def test_the_rate_of_a_product_depends_on_its_tokens():
    machine = cost.Profile("test", 1e15, {"float32": {4: 1e9, 16: 4e9, 64: 1e12}}, 1e9, 0.0)
    rates = {N: 2 * N * 100 * 100 / cost.time("dense", N, 100, 100, 0, "float32", machine) for N in (1, 4, 8, 16, 99)}
    assert rates == pytest.approx({1: 1e9, 4: 1e9, 8: 2e9, 16: 4e9, 99: 1e12})
    assert cost.roof("dense", 8, 100, 100, 0, "float32", machine) == pytest.approx(2 * 8 * 1e4 / 1e12)


@pytest.mark.parametrize("form", cost.STEPS)
def test_every_form_has_a_time_that_grows_with_the_tokens(form):
    times = [cost.time(form, N, 512, 384, 128, "bfloat16", MACHINE) for N in (1, 100, 10_000)]
    assert 0 < times[0] < times[1] < times[2]
