"""The two parts of an output, put in order."""

import sys

import pytest
import torch

from pifa_compile import _torch
from pifa_compile.kernels import merge as kernels
from pifa_compile.kernels.merge import available, blocks_of, merge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parts(m, r, *lead, dtype=torch.float32):
    """Random parts, the positions of an order that keeps both in their own, and what they make together."""
    pivots = torch.randperm(m)[:r].sort().values
    others = torch.tensor(sorted(set(range(m)) - set(pivots.tolist())), dtype=torch.int64)
    order = torch.cat([pivots, others])
    y_p, y_np = torch.randn(*lead, r).to(dtype), torch.randn(*lead, m - r).to(dtype)
    wanted = torch.full((*lead, m), torch.nan, dtype=dtype)
    wanted[..., order] = torch.cat([y_p, y_np], -1)
    return y_p, y_np, torch.argsort(order), wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "r"), [(1, 1), (5, 2), (31, 30), (32, 7), (33, 16), (64, 1), (100, 51), (384, 200)])
def test_every_feature_is_in_its_place(m, r, dtype):
    if not available(dtype):
        pytest.skip(f"no instructions for {dtype} here")
    for lead in [(1,), (3,), (2, 5)]:
        y_p, y_np, positions, wanted = parts(m, r, *lead, dtype=dtype)
        assert torch.equal(merge(y_p, y_np, blocks_of(positions, r)), wanted)


def test_parts_may_be_slices():
    if not available(torch.float32):
        pytest.skip("no instructions here")
    y_p, y_np, positions, wanted = parts(50, 20, 2, 3)
    wide = torch.cat([torch.randn(2, 3, 7), y_p, y_np], -1)
    assert torch.equal(merge(wide[..., 7:27], wide[..., 27:], blocks_of(positions, 20)), wanted)
    assert torch.equal(merge(y_p.transpose(0, 1).contiguous().transpose(0, 1), y_np, blocks_of(positions, 20)), wanted)


def test_parts_that_lose_their_order_have_no_blocks():
    assert blocks_of(torch.tensor([0, 2, 1, 3]), 2) is not None
    assert blocks_of(torch.tensor([1, 2, 0, 3]), 2) is None
    assert blocks_of(torch.tensor([0, 3, 1, 2]), 2) is None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("m", "r"), [(1, 1), (33, 16), (384, 200)])
def test_without_the_kernel_it_is_slower_and_the_same(m, r, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_kernel", lambda size: None)
    for lead in [(), (3,), (2, 5)]:
        y_p, y_np, positions, wanted = parts(m, r, *lead, dtype=dtype)
        assert torch.equal(merge(y_p, y_np, blocks_of(positions, r)), wanted)


def test_only_processors_with_the_instructions_have_it(monkeypatch):
    begun = []
    monkeypatch.setattr(kernels.native, "begin", begun.append)
    for known, having in ((set(), []), ({"avx512f"}, [torch.float32]), ({"avx512f", "avx512_vbmi2"}, [*DTYPES])):
        monkeypatch.setattr(_torch, "cpu_instructions", lambda known=known: frozenset(known))
        assert [dtype for dtype in (*DTYPES, torch.float64) if available(dtype)] == having
    assert begun == ["merge"] * 4  # nothing is compiled where it is of no use


def test_instructions_are_as_the_kernel_finds_them():
    assert _torch.cpu_instructions() or sys.platform != "linux"
    for dtype in DTYPES:
        assert available(dtype) == (kernels._kernel(dtype.itemsize) is not None)


def test_what_does_not_fit_is_refused():
    y_p, y_np, positions, _ = parts(50, 20, 2)
    with pytest.raises(RuntimeError, match="do not fit"):
        merge(y_p, y_np[:1], blocks_of(positions, 20))
    with pytest.raises(RuntimeError, match="do not fit"):
        merge(y_p, y_np, blocks_of(positions, 20)[:1])


def test_it_is_a_proper_operator():
    if not available(torch.float32):
        pytest.skip("no instructions here")
    y_p, y_np, positions, _ = parts(50, 20, 2)
    torch.library.opcheck(merge, (y_p, y_np, blocks_of(positions, 20)))
