"""From a low-rank weight to pivoted factors: the right rows, the best coefficients, and the error that is reported."""

import re

import pytest
import torch

from pifa_compile import pivoting
from pifa_compile.errors import WeightError
from pifa_compile.factors import PairFactors, PifaFactors
from pifa_compile.pivoting import (
    ERROR_LIMITS,
    MAXVOL_TOLERANCE,
    PIVOTINGS,
    LowRank,
    choose_pivots,
    factorize,
    group_pivots,
    low_rank_of_pair,
    lu_pivots,
    maxvol_pivots,
    numerical_rank,
    pivot,
    qr_pivots,
    svd_of,
    weight_error,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(72, 40), (40, 72), (56, 56)]  # tall, wide, square


@pytest.fixture
def low_rank(random_matrix):
    """``low_rank(m, n, r, ...)``: the nearest weight of rank r to a random one, as the method makes it."""

    def make(m, n, r, dtype=torch.float32, seed=0, decay=1.0):
        u, s, vh = svd_of(random_matrix(m, n, decay=decay, seed=seed, dtype=dtype))
        return LowRank(u[:, :r] * s[:r], vh[:r])

    return make


def exact(low_rank):
    return low_rank.coordinates.double() @ low_rank.basis.double()


def exact_coefficients(rows, pivots):
    """The coefficients (float64) that make the other rows from the pivots, in the order of the others."""
    others = [i for i in range(rows.shape[0]) if i not in set(pivots.tolist())]
    return torch.linalg.lstsq(rows[pivots].double().T, rows[others].double().T).solution.T


# --- the error of what is stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("r", ["one", "some", "full"])
def test_factors_stand_for_the_low_rank_weight_with_the_error_reported(low_rank, relative, m, n, r, dtype):
    rank = {"one": 1, "some": 17, "full": min(m, n)}[r]
    given = low_rank(m, n, rank, dtype)
    made = factorize(given, dtype)
    assert isinstance(made.factors.validate(), PifaFactors)
    assert (made.factors.shape, made.factors.rank, made.factors.dtype) == ((m, n), rank, dtype)
    assert made.factors.coefficients.dtype == dtype
    assert made.factors.coefficients.is_contiguous()
    assert made.error <= ERROR_LIMITS[dtype]
    assert made.error == pytest.approx(relative(made.factors.weight(), exact(given)), rel=1e-3)
    assert made.reason is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PIVOTINGS)
def test_pivot_rows_are_rows_of_the_weight(low_rank, name, dtype):
    given = low_rank(72, 40, 17, dtype)
    factors, _ = pivot(given, choose_pivots(given.coordinates, name), dtype)
    rows = factors.row_order[:17].long()
    assert torch.equal(rows, rows.sort().values)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(factors.pivot_rows, exact(given)[rows].to(dtype), rtol=step, atol=1e-15)
    assert torch.equal(factors.row_order[17:], factors.row_order[17:].sort().values)


def test_the_error_of_poor_pivots_is_reported_too(low_rank, relative):
    """Rows that are far from spanning the weight: an error near 1, not near rounding."""
    given = low_rank(72, 40, 4)
    flat = LowRank(given.coordinates.clone(), given.basis)
    flat.coordinates[:4] = flat.coordinates[0]
    factors, error = pivot(flat, torch.arange(4), torch.float32)
    assert error > 0.1
    assert error == pytest.approx(relative(factors.weight(), exact(flat)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [17, 28, 39])
def test_the_refit_beats_the_unrefitted_solve_in_16_bit(low_rank, relative, dtype, r):
    """Coefficients for the rounded pivot rows are better than those for the exact ones, once both are rounded."""
    for seed in range(5):
        given = low_rank(120, 40, r, dtype, seed)
        pivots = choose_pivots(given.coordinates)
        factors, error = pivot(given, pivots, dtype)
        plain = exact_coefficients(exact(given), pivots).to(dtype)
        unrefitted = PifaFactors(factors.pivot_rows, plain, factors.row_order)
        assert 1.05 * error < relative(unrefitted.weight(), exact(given))


def test_coefficients_are_the_least_squares_fit_to_the_rounded_rows(low_rank):
    """To the rounding of the coefficients themselves, against a solver of another kind."""
    given = low_rank(72, 40, 17)
    factors, _ = pivot(given, choose_pivots(given.coordinates), torch.bfloat16)
    others = exact(given)[factors.row_order[17:].long()]
    best = torch.linalg.lstsq(factors.pivot_rows.double().T, others.T).solution.T
    torch.testing.assert_close(factors.coefficients.double(), best, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("decay", [6, 9, 12])
def test_float64_weights_keep_their_precision(low_rank, relative, decay):
    """However far the singular values fall."""
    given = low_rank(60, 50, 50, torch.float64, decay=decay)
    made = factorize(given, torch.float64)
    assert made.factors.form == "pifa"
    assert relative(made.factors.weight(), exact(given)) < 1e-14


def test_weights_of_any_scale_are_factored_alike(low_rank):
    given = low_rank(72, 40, 17)
    errors = []
    for scale in (1e-20, 1.0, 1e20):
        made = factorize(LowRank(given.coordinates * scale, given.basis), torch.float32)
        assert made.factors.form == "pifa"
        errors.append(made.error)
    assert max(errors) < 1.5 * min(errors)


# --- choosing pivots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIVOTINGS)
@pytest.mark.parametrize(("m", "r"), [(30, 1), (30, 7), (30, 30), (1, 1)])
def test_pivots_are_distinct_rows_in_ascending_order(name, m, r):
    for dtype in (torch.float32, torch.float64):
        pivots = choose_pivots(torch.randn(m, r, dtype=dtype), name)
        assert pivots.dtype == torch.int64
        assert len(set(pivots.tolist())) == r
        assert pivots.tolist() == sorted(pivots.tolist())
        assert 0 <= int(pivots.min()) <= int(pivots.max()) < m


@pytest.mark.parametrize("tolerance", [1.0 + 1e-6, MAXVOL_TOLERANCE, 2.0])
def test_maxvol_bounds_every_coefficient(tolerance):
    by_lu = []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randn(120, 24, generator=g) * torch.logspace(0, -3, 24)
        found = exact_coefficients(rows, maxvol_pivots(rows, tolerance)).abs().max()
        assert float(found) <= tolerance * (1 + 1e-4)
        by_lu.append(float(exact_coefficients(rows, lu_pivots(rows)).abs().max()))
    assert max(by_lu) > tolerance * 1.1, "these rows would not show a missing search"


def test_maxvol_bounds_the_coefficients_where_lu_is_at_its_worst():
    """Where partial pivoting finds nothing to exchange, and coefficients grow by nearly 2 from column to column."""
    rows = torch.eye(13, 12) - 0.99 * torch.ones(13, 12).tril(-1)
    assert float(exact_coefficients(rows, lu_pivots(rows)).abs().max()) > 1000
    assert float(exact_coefficients(rows, maxvol_pivots(rows)).abs().max()) <= MAXVOL_TOLERANCE * (1 + 1e-4)


def test_qr_pivots_are_the_rows_farthest_from_those_before():
    rows = torch.randn(40, 6, dtype=torch.float64)
    residual, wanted = rows.clone(), []
    for _ in range(6):
        wanted.append(int(residual.norm(dim=1).argmax()))
        direction = residual[wanted[-1]] / residual[wanted[-1]].norm()
        residual = residual - (residual @ direction)[:, None] * direction
    assert qr_pivots(rows).tolist() == wanted
    assert qr_pivots(rows.float()).tolist() == wanted


def test_lu_pivots_are_those_of_elimination_with_partial_pivoting():
    rows = torch.randn(40, 6, dtype=torch.float64)
    order, work = list(range(40)), rows.clone()
    for k in range(6):
        best = k + int(work[k:, k].abs().argmax())
        order[k], order[best] = order[best], order[k]
        work[[k, best]] = work[[best, k]]
        work[k + 1 :] -= work[k + 1 :, k : k + 1] / work[k, k] * work[k]
    assert lu_pivots(rows).tolist() == order[:6]


@pytest.mark.parametrize("group", [2, 4, 8])
def test_group_pivots_are_whole_aligned_groups(low_rank, group):
    given = low_rank(64, 48, 16)
    pivots = choose_pivots(given.coordinates, group=group)
    blocks = pivots.view(-1, group)
    assert torch.equal(blocks[:, 0] % group, torch.zeros(16 // group, dtype=torch.int64))
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(group))
    assert len(set(pivots.tolist())) == 16
    made = factorize(given, torch.float32, group=group)
    assert made.pivoting == f"groups of {group}"
    assert torch.equal(made.factors.row_order[:16].long(), pivots)


def test_the_first_group_is_the_one_of_the_largest_volume():
    rows = torch.randn(24, 8, dtype=torch.float64)
    volumes = [float(torch.linalg.det(block @ block.T)) for block in rows.split(4)]
    assert group_pivots(rows, 4)[:4].tolist() == [4 * volumes.index(max(volumes)) + i for i in range(4)]


@pytest.mark.parametrize(("m", "r"), [(30, 8), (32, 6)])
def test_groups_need_shapes_that_are_multiples(m, r):
    with pytest.raises(ValueError, match=f"m={m}, r={r}"):
        group_pivots(torch.randn(m, r), 4)


def test_groups_without_volume_still_give_distinct_rows(relative):
    """A weight with a zero row in every group but the first two, so that not enough groups have a volume."""
    rows = torch.randn(32, 16)
    rows[8::4] = 0
    u, s, vh = svd_of(rows)
    given = LowRank(u * s, vh)
    pivots = group_pivots(given.coordinates, 4)
    assert len(set(pivots.tolist())) == 16
    zeros = LowRank(torch.cat([torch.randn(4, 8), torch.zeros(12, 8)]), torch.linalg.qr(torch.randn(9, 8)).Q.T)
    assert sorted(group_pivots(zeros.coordinates, 4).tolist()) == list(range(8))
    made = factorize(given, torch.float32, group=4)
    assert made.factors.validate().form == "pifa"
    assert relative(made.factors.weight(), exact(given)) == pytest.approx(made.error, rel=1e-3)


# --- ranks that are found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("true_rank", [1, 9, 40])
def test_the_rank_of_a_deficient_weight_is_found(random_matrix, relative, m, n, true_rank, dtype):
    weight = random_matrix(m, n, true_rank, decay=1, dtype=dtype)
    u, s, vh = svd_of(weight)
    assert numerical_rank(s, m, n) == true_rank
    made = factorize(LowRank(u[:, :true_rank] * s[:true_rank], vh[:true_rank]), dtype)
    assert relative(made.factors.weight(), weight) < ERROR_LIMITS[dtype]


def test_the_numerical_rank_of_special_spectra():
    assert numerical_rank(torch.zeros(0), 4, 0) == 0
    assert numerical_rank(torch.zeros(5), 5, 5) == 0
    assert numerical_rank(torch.tensor([3.0, 2.0, 1.0]), 3, 3) == 3
    assert numerical_rank(torch.tensor([1.0, 1e-8]), 9, 9) == 1
    assert numerical_rank(torch.tensor([1.0, 1e-8], dtype=torch.float64), 9, 9) == 2


@pytest.mark.parametrize(("m", "k", "n"), [(40, 12, 30), (12, 30, 20), (30, 30, 12), (5, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_becomes_the_low_rank_weight_of_its_product(relative, m, k, n, dtype):
    left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    found = low_rank_of_pair(left, right)
    assert found.rank == min(m, k, n)
    assert relative(found.weight(), left.double() @ right.double()) < 1e-13
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(found.rank).double())


def test_the_rank_of_a_pair_is_found():
    left = torch.randn(40, 3) @ torch.randn(3, 12)
    right = torch.randn(12, 5) @ torch.randn(5, 30)
    assert low_rank_of_pair(left, right).rank == 3


def test_a_pair_whose_product_vanishes_is_refused():
    left, right = torch.zeros(6, 4), torch.zeros(4, 5)
    left[:, 0], right[1] = 1, 1
    with pytest.raises(WeightError, match=r"blocks\.3: the product of the pair is zero"):
        low_rank_of_pair(left, right, "blocks.3")


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.zeros(4, 3), r"the \(4, 3\) weight is all zeros, so its rank is 0; skip the layer"),
        (torch.tensor([[1.0, float("nan")]]), "infinite or NaN entries; repair it or skip the layer"),
        (torch.tensor([[1.0, float("inf")]]), "infinite or NaN entries"),
        (torch.tensor([[0.0, -float("inf")]]).half(), "infinite or NaN entries"),
        (torch.ones(2, 2, dtype=torch.int8), r"a torch.int8 tensor of shape \(2, 2\); give a floating point matrix"),
        (torch.ones(2, 2, 2), r"of shape \(2, 2, 2\)"),
    ],
)
def test_a_weight_that_cannot_be_factored_is_named(weight, problem):
    with pytest.raises(WeightError, match=rf"^blocks\.3: .*{problem}"):
        svd_of(weight, "blocks.3")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decomposition_is_in_float32_or_better(random_matrix, dtype):
    weight = torch.nn.Parameter(random_matrix(20, 30, dtype=dtype))
    u, s, vh = svd_of(weight)
    assert {t.dtype for t in (u, s, vh)} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert not u.requires_grad
    torch.testing.assert_close((u * s) @ vh, weight.detach().to(u.dtype))


# --- what is tried in which order -------------------------------------------------------------------------------------


def test_factors_fall_back_to_qr_pivots(low_rank, monkeypatch):
    given = low_rank(120, 80, 40, torch.bfloat16)
    _, by_lu = pivot(given, choose_pivots(given.coordinates, "lu"), torch.bfloat16)
    _, by_qr = pivot(given, choose_pivots(given.coordinates, "qr"), torch.bfloat16)
    assert by_qr < by_lu, "this weight does not tell the two apart"
    monkeypatch.setitem(pivoting.ERROR_LIMITS, torch.bfloat16, (by_lu + by_qr) / 2)
    made = factorize(given, torch.bfloat16, pivoting="lu")
    assert (made.pivoting, made.factors.form, made.reason) == ("qr", "pifa", None)
    assert made.error == by_qr


@pytest.mark.parametrize("group", [1, 8])
def test_factors_fall_back_to_the_pair_with_a_reason(low_rank, relative, monkeypatch, group):
    given = low_rank(64, 48, 16)
    monkeypatch.setitem(pivoting.ERROR_LIMITS, torch.float32, 1e-12)
    made = factorize(given, torch.float32, group=group)
    assert isinstance(made.factors, PairFactors)
    assert made.factors.rank == 16
    assert made.error == pytest.approx(relative(made.factors.weight(), exact(given)))
    reason = r"kept as a pair: pivoted factors in torch.float32 have a relative error of .*e-08, above 1.0e-12"
    assert made.reason is not None
    assert re.fullmatch(reason, made.reason)


def test_groups_may_have_three_times_the_error(low_rank, monkeypatch):
    given = low_rank(64, 48, 16)
    _, error = pivot(given, choose_pivots(given.coordinates, group=8), torch.float32)
    monkeypatch.setitem(pivoting.ERROR_LIMITS, torch.float32, error / 2.9)
    assert factorize(given, torch.float32, group=8).pivoting == "groups of 8"
    monkeypatch.setitem(pivoting.ERROR_LIMITS, torch.float32, error / 3.1)
    assert factorize(given, torch.float32, group=8).pivoting != "groups of 8"


def test_rows_that_overflow_are_kept_as_a_pair(relative):
    """Truncation can push an entry over the largest fp16 number; the two sides of a pair are far from it."""
    weight = torch.where(torch.randn(20, 16) > 0.5, 65000.0, -65000.0).half()
    u, s, vh = svd_of(weight)
    given = LowRank(u[:, :8] * s[:8], vh[:8])
    assert int((exact(given).abs() > 65504).any(dim=1).sum()) > 12, "too few rows of this weight overflow"
    made = factorize(given, torch.float16)
    assert made.factors.form == "pair"
    assert made.error == pytest.approx(relative(made.factors.weight(), exact(given)))
    assert made.error < ERROR_LIMITS[torch.float16]
    assert "relative error of inf" in made.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_pair_can_be_asked_for(low_rank, relative, dtype):
    given = low_rank(72, 40, 17, dtype)
    made = factorize(given, dtype, form="pair")
    assert isinstance(made.factors.validate(), PairFactors)
    assert (made.factors.rank, made.factors.dtype, made.reason) == (17, dtype, None)
    assert made.error == pytest.approx(relative(made.factors.weight(), exact(given)))
    assert made.error == weight_error(made.factors, given) <= ERROR_LIMITS[dtype]
    assert made.details() == {"pivoting": "none"}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_coefficients_in_float16_make_bfloat16_factors_more_exact(low_rank, relative, scale):
    given = low_rank(120, 80, 40, torch.bfloat16)
    given = LowRank(given.coordinates * scale, given.basis)
    made = factorize(given, torch.bfloat16, coefficients="float16")
    assert (made.factors.dtype, made.factors.coefficients.dtype) == (torch.bfloat16, torch.float16)
    assert made.error < 0.9 * factorize(given, torch.bfloat16).error
    assert made.error == pytest.approx(relative(made.factors.validate().weight(), exact(given)), rel=1e-3)
    largest = float(made.factors.pivot_rows.float().norm(dim=1).max()) * made.factors.y_scale
    assert 0.5 < largest < 2, "y_p would be far from the middle of float16"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_coefficients_in_float16_are_for_bfloat16_alone(low_rank, dtype):
    made = factorize(low_rank(72, 40, 17, dtype), dtype, coefficients="float16")
    assert made.factors.coefficients.dtype == dtype
    assert made.factors.y_scale == 1.0


def test_both_sides_of_a_pair_have_the_same_size(low_rank):
    """So that 16 bit cost the same in each, and neither over- nor underflows."""
    pair = low_rank(72, 40, 17, decay=6.0).pair(torch.float32)
    torch.testing.assert_close(pair.left.norm(dim=0), pair.right.norm(dim=1))


def test_details_tell_the_size_of_the_coefficients(low_rank):
    given = low_rank(72, 40, 17)
    made = factorize(given, torch.float32)
    c = exact_coefficients(exact(given), made.factors.row_order[:17].long())
    size = {"max_coefficient": float(c.abs().max()), "coefficient_norm": float(c.norm())}
    assert made.details() == {"pivoting": "maxvol"} | {name: pytest.approx(x, rel=1e-4) for name, x in size.items()}
    full = factorize(low_rank(40, 72, 40), torch.float32)
    assert full.details() == {"pivoting": "maxvol", "max_coefficient": 0.0, "coefficient_norm": 0.0}
