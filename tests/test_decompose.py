"""How ``pifa::linear`` is spelled out on CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pifa_compile
from pifa_compile import Svd
from pifa_compile.factors import PifaFactors
from pifa_compile.passes.decompose import GROUPS, group_size, is_ascending


@pytest.mark.parametrize("group", GROUPS)
def test_aligned_groups_are_seen(group):
    groups = torch.randperm(6)
    positions = (groups[:, None] * group + torch.arange(group)).flatten()
    assert group_size(positions) == group


def test_what_is_no_aligned_group():
    assert group_size(torch.randperm(64)) == 1
    assert group_size(torch.arange(60).roll(30)) == 1  # of no multiple of 8
    shifted = torch.cat([torch.arange(4, 64), torch.arange(4)])  # runs of 8, but not aligned
    assert group_size(shifted) == 1
    swapped = torch.arange(64)
    swapped[[0, 1]] = swapped[[1, 0]]  # one pair out of order in an otherwise aligned order
    assert group_size(swapped) == 1


def test_pivots_first_in_ascending_order_need_no_gather():
    def factors(order):
        return PifaFactors(torch.randn(2, 5), torch.randn(4, 2), torch.tensor(order, dtype=torch.int32))

    assert is_ascending(factors([0, 1, 2, 3, 4, 5]).gather_order)
    assert not is_ascending(factors([1, 0, 2, 3, 4, 5]).gather_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pivot_group", [1, 8])
def test_every_dtype_and_order_through_inductor(dtype, pivot_group, relative, applied, store):
    model = nn.Linear(32, 64).to(dtype)
    recipe = Svd(density=0.6, rank_multiple=8, pivot_group=pivot_group)
    pifa_compile.compress(model, recipe, progress=False)
    x = torch.randn(2, 3, 32, dtype=dtype)
    factors = pifa_compile.apply_(nn.Sequential(model))[0].factors()
    assert group_size(factors.gather_order) == pivot_group
    with torch.no_grad():
        y = torch.compile(model, backend="pifa")(x)
    wanted = applied(factors, x) + model.bias.double()
    assert y.dtype == dtype
    assert relative(y, wanted) < {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]


def test_a_wide_layer_of_full_rank_and_one_token(relative, applied):
    model, x = nn.Linear(48, 8, bias=False), torch.randn(48)
    pifa_compile.compress(model, Svd(density=0.99, rank_multiple=1), progress=False)
    factors = pifa_compile.apply_(nn.Sequential(model))[0].factors()
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", options={"inner": "eager"})(x)
    assert relative(y, applied(factors, x)) < 1e-6
