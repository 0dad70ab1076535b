"""The factors stand for the weight they say, and the arithmetic of their size is that of the tensors they hold."""

import math
from dataclasses import replace

import pytest
import torch

from pifa_compile.errors import FactorError
from pifa_compile.factors import (
    FLOP_PER_TOKEN,
    N_IN,
    NUMBERS,
    M,
    PairFactors,
    PifaFactors,
    R,
    density_of_rank,
    factors_from_tensors,
    flop_per_token,
    numbers,
    rank_for_density,
    rank_for_numbers,
)

FORMS = ("dense", "pair", "pifa")
SHAPES = [(1, 1), (7, 7), (12, 5), (5, 12), (40, 9), (9, 40), (33, 64)]


def make(m=6, n=5, r=2, dtype=torch.float32, bias=False, **fields):
    row_order = torch.randperm(m, dtype=torch.int32)
    b = torch.randn(m).to(dtype) if bias else None
    known = {"pivot_rows": torch.randn(r, n), "coefficients": torch.randn(m - r, r)}
    return PifaFactors(**{k: t.to(dtype) for k, t in known.items()}, row_order=row_order, bias=b, **fields)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_symbolic_forms_agree_with_the_functions(form, m, n):
    for r in range(1, min(m, n) + 1):
        at = {M: m, N_IN: n, R: r}
        assert NUMBERS[form].subs(at) == numbers(form, m, n, r)
        assert FLOP_PER_TOKEN[form].subs(at) == flop_per_token(form, m, n, r)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_numbers_and_flop_are_those_of_the_tensors(m, n):
    for r in range(1, min(m, n) + 1):
        pifa, pair = make(m, n, r), PairFactors(torch.randn(m, r), torch.randn(r, n))
        matrices = pifa.pivot_rows.numel() + pifa.coefficients.numel()
        assert pifa.numbers == numbers("pifa", m, n, r) == matrices + r
        assert flop_per_token("pifa", m, n, r) == 2 * matrices
        assert pair.numbers == numbers("pair", m, n, r) == pair.left.numel() + pair.right.numel()
        assert flop_per_token("pair", m, n, r) == 2 * pair.numbers


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_pivoted_factors_never_cost_more_than_dense_or_a_pair(m, n):
    assert numbers("dense", m, n) == m * n
    for r in range(1, min(m, n) + 1):
        assert flop_per_token("pifa", m, n, r) <= flop_per_token("dense", m, n) == 2 * m * n
        assert flop_per_token("pifa", m, n, r) < flop_per_token("pair", m, n, r)
        assert numbers("pifa", m, n, r) <= numbers("pair", m, n, r)


@pytest.mark.parametrize("form", ["pifa", "pair"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_the_rank_for_a_density_is_the_largest(form, m, n, multiple):
    for density in (0.01, 0.1, 0.25, 0.3, 0.5, 0.57, 0.7, 0.9, 0.999):
        fitting = [r for r in range(1, min(m, n) + 1) if numbers(form, m, n, r) <= density * m * n]
        largest = max(fitting, default=0)
        assert rank_for_density(m, n, density, multiple, form) == largest - largest % multiple


@pytest.mark.parametrize("form", ["pifa", "pair"])
@pytest.mark.parametrize(("m", "n"), [*SHAPES, (100, 333), (77, 1000)])
def test_the_density_of_a_rank_gives_that_rank(form, m, n):
    """Whatever rounding density times m n does."""
    for r in range(1, min(m, n) + 1):
        assert density_of_rank(m, n, r, form) == numbers(form, m, n, r) / (m * n)
        assert rank_for_density(m, n, density_of_rank(m, n, r, form), form=form) == r


@pytest.mark.parametrize("budget", [-5, 0, 0.5, 10.999999])
def test_no_rank_fits_a_budget_below_that_of_rank_one(budget):
    assert numbers("pifa", 6, 5, 1) == 11
    assert rank_for_numbers(6, 5, budget) == 0
    assert rank_for_numbers(6, 5, 11) == 1


def test_a_budget_without_end_gives_the_full_rank():
    assert rank_for_numbers(6, 5, 1e9) == rank_for_numbers(5, 6, 1e9) == 5
    assert rank_for_numbers(6, 5, 1e9, multiple=2) == 4


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "r"), [(6, 5, 2), (5, 6, 5), (9, 4, 1), (7, 7, 7), (4, 9, 3)])
def test_factors_apply_like_the_weight_they_stand_for(applied, m, n, r):
    x = torch.randn(11, n)
    pifa, pair = make(m, n, r), PairFactors(torch.randn(m, r), torch.randn(r, n))
    for factors in (pifa, pair):
        assert factors.shape == factors.weight().shape == (m, n)
        assert factors.rank == r
        assert factors.weight().dtype == torch.float64
        torch.testing.assert_close(x.double() @ factors.weight().T, applied(factors, x))
    pivots = pifa.row_order[:r].long()
    assert torch.equal(pifa.weight()[pivots], pifa.pivot_rows.double())


def test_the_gather_order_undoes_the_row_order():
    factors = make(50, 8, 5)
    positions = torch.arange(50)
    assert torch.equal(factors.gather_order[factors.row_order.long()], positions)
    assert torch.equal(factors.row_order.long()[factors.gather_order], positions)
    assert factors.gather_order.dtype == torch.int64
    assert factors.gather_order is factors.gather_order


def test_bytes_count_every_tensor_that_is_stored():
    factors = make(6, 5, 2, torch.float16, bias=True)
    assert factors.nbytes == 2 * (2 * 5) + 2 * (4 * 2) + 4 * 6 + 2 * 6
    assert PairFactors(torch.zeros(6, 2), torch.zeros(2, 5)).nbytes == 4 * (12 + 10)


def test_another_dtype_changes_all_but_in_16_bit_the_coefficients_of_a_mixed_form():
    pure = make(bias=True).to(dtype=torch.float16)
    kept = {name: t.dtype for name, t in pure.tensors().items()}
    half = torch.float16
    assert kept == {"pivot_rows": half, "coefficients": half, "row_order": torch.int32, "bias": half}
    mixed = replace(make(y_scale=0.25, bias=True).to(dtype=torch.bfloat16), coefficients=torch.randn(4, 2).half())
    assert mixed.to(dtype=torch.bfloat16).coefficients.dtype == mixed.to(device="cpu").coefficients.dtype == half
    wide = mixed.to(dtype=torch.float32)
    assert {t.dtype for t in (wide.pivot_rows, wide.coefficients, wide.bias)} == {torch.float32}
    assert wide.y_scale == 0.25
    pair = PairFactors(torch.randn(6, 2), torch.randn(2, 5), torch.randn(6)).to(dtype=torch.bfloat16)
    assert {t.dtype for t in pair.tensors().values()} == {pair.dtype} == {torch.bfloat16}


def test_another_device_takes_every_tensor_along():
    for factors in (make(bias=True), PairFactors(torch.randn(6, 2), torch.randn(2, 5), torch.randn(6))):
        moved = factors.to(device="meta")
        assert {t.device.type for t in moved.tensors().values()} == {moved.device.type} == {"meta"}
        assert moved.dtype == torch.float32


def test_factors_compare_and_hash_by_identity():
    a, b = make(), make()
    assert a == a
    assert a != b
    assert len({a, b, a}) == 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pivot_rows": torch.zeros(5)}, "pivot_rows is torch.float32 in 1 dimensions"),
        ({"pivot_rows": torch.zeros(2, 5, dtype=torch.int64)}, "pivot_rows is torch.int64"),
        ({"coefficients": torch.zeros(4)}, "coefficients is torch.float32 in 1 dimensions"),
        ({"coefficients": torch.zeros(3, 2)}, r"coefficients are \(3, 2\), not \(4, 2\), beside 2 x 5"),
        ({"coefficients": torch.zeros(4, 3)}, r"coefficients are \(4, 3\)"),
        ({"row_order": torch.arange(6)}, "row order is torch.int64"),
        ({"row_order": torch.zeros(6, 1, dtype=torch.int32)}, "2 dimensions"),
        ({"row_order": torch.tensor([0, 1, 2, 3, 4, 4], dtype=torch.int32)}, "each of the 6 output rows once"),
        ({"row_order": torch.arange(1, 7, dtype=torch.int32)}, "each of the 6 output rows once"),
        ({"bias": torch.zeros(5)}, r"bias is \(5,\), not \(6,\)"),
        ({"y_scale": 0.3}, "no power of two"),
        ({"y_scale": 0.0}, "no power of two"),
        ({"y_scale": math.inf}, "no power of two"),
    ],
)
def test_factors_that_do_not_fit_together_are_refused(change, problem):
    good = make(bias=True, y_scale=0.5)
    assert good.validate() is good
    with pytest.raises(FactorError, match=f"^blocks.3: .*{problem}"):
        replace(good, **change).validate("blocks.3")


@pytest.mark.parametrize(
    ("left", "right", "bias", "problem"),
    [
        (torch.zeros(6), torch.zeros(2, 5), None, "left is torch.float32 in 1 dimensions"),
        (torch.zeros(6, 2), torch.zeros(2, 5).long(), None, "right is torch.int64"),
        (torch.zeros(6, 3), torch.zeros(2, 5), None, r"\(6, 3\) and right \(2, 5\) are no low-rank pair"),
        (torch.zeros(6, 2), torch.zeros(2, 5), torch.zeros(5), r"bias is \(5,\), not \(6,\)"),
    ],
)
def test_pairs_that_do_not_fit_together_are_refused(left, right, bias, problem):
    with pytest.raises(FactorError, match=problem):
        PairFactors(left, right, bias).validate()
    PairFactors(torch.zeros(6, 2), torch.zeros(2, 5), torch.zeros(6)).validate()


def test_factors_come_back_from_their_tensors():
    pifa = make(bias=True, y_scale=2.0)
    again = factors_from_tensors(pifa.tensors(), 2.0)
    assert isinstance(again, PifaFactors)
    assert again.y_scale == 2.0
    pair = PairFactors(torch.randn(6, 2), torch.randn(2, 5))
    for given, found in ((pifa, again), (pair, factors_from_tensors(pair.tensors()))):
        assert found.form == given.form
        assert all(found.tensors()[name] is t for name, t in given.tensors().items())


@pytest.mark.parametrize("names", [set(), {"left"}, {"left", "right", "middle"}, {"pivot_rows", "coefficients"}])
def test_tensors_of_other_names_are_no_factors(names):
    with pytest.raises(FactorError, match="are no factors known here"):
        factors_from_tensors({name: torch.zeros(2, 2) for name in names}, layer="blocks.3")
