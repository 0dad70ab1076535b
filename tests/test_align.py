"""The pass that promises aligned groups of rows to kernels on CUDA."""

from __future__ import annotations

import copy

import pytest
import torch
from pretend_h200.model import graph_on_cuda
from torch import nn

import pifa_compile
from pifa_compile import Svd
from pifa_compile.kernels.op import linear


def promises(model, **options):
    """What every operator of the graph on CUDA promises of its order, and the graph's output."""
    x = torch.randn(64, 48)
    with torch.no_grad():
        gm, given = graph_on_cuda(model, [x], **options)
        y = gm(*given)
    return [node.kwargs.get("aligned", 1) for node in gm.graph.nodes if node.target is linear], x, y


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("group", "promised"), [(1, 1), (8, 8), (16, 8)])
def test_pivots_in_groups_are_promised_and_free_ones_are_not(group, promised, prepared, tmp_path, relative):
    model = nn.Linear(48, 96)
    pifa_compile.compress(model, Svd(density=0.7, pivot_group=group, rank_multiple=16), store=tmp_path, progress=False)
    whole = pifa_compile.apply_(nn.Sequential(copy.deepcopy(model)), store=tmp_path)
    wanted = pifa_compile.restore_(copy.deepcopy(whole)).double()
    found, x, (y,) = promises(whole) if prepared else promises(nn.Sequential(model), store=tmp_path)
    assert found == [promised]
    assert relative(y, wanted(x.double())) < 1e-6


def test_sizes_that_are_no_whole_groups_promise_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(48, 92))
    pifa_compile.compress(model, Svd(density=0.7), store=tmp_path, progress=False)
    assert promises(model, store=tmp_path)[0] == [1]
