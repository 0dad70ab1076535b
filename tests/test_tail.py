"""The library's way to the whole output: the kernel beside the templates where choices are measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pifa_compile.kernels import triton_templates
from pifa_compile.kernels.tail import tail_by_library
from pifa_compile.kernels.triton_templates import some_order


@pytest.mark.parametrize(("dtypes", "bound"), [
    ((torch.float32, torch.float32), 1e-6),
    ((torch.float16, torch.float16), 1e-3),
    ((torch.bfloat16, torch.float16), 5e-3),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("r", [1, 19, 30])
def test_every_column_is_written_where_the_row_order_says(dtypes, bound, tokens, r, relative):
    dtype, inner = dtypes
    m, scale = 30, 1.0 if dtype == inner else 4.0
    y_p, c = torch.randn(tokens, r).to(inner), torch.randn(m - r, r).to(inner)
    order = torch.randperm(m).int()
    y = tail_by_library(y_p, c, order, dtype=dtype, out_scale=scale)
    exact = torch.empty(tokens, m, dtype=torch.float64)
    exact[:, order.long()] = scale * torch.cat([y_p.double(), y_p.double() @ c.double().T], -1)
    assert y.dtype == dtype and y.shape == exact.shape
    assert tokens == 0 or relative(y, exact) < bound


@pytest.mark.parametrize("aligned", [1, 8])
def test_what_is_measured_stores_every_column_once_in_two_ascending_parts(aligned, monkeypatch):
    memory = torch.full((48,), 10**6, dtype=torch.int32)  # as uninitialised memory may be
    monkeypatch.setattr(triton_templates, "autotuner", lambda: SimpleNamespace(numbers=lambda ir: memory))
    order = some_order(None, 16, aligned)
    assert order.dtype == torch.int32 and order.sort().values.tolist() == list(range(48))
    assert all(torch.equal(part, part.sort().values) for part in (order[:16], order[16:]))
    groups = order.view(-1, aligned)
    assert bool((groups[:, :1] % aligned == 0).all() and (groups - groups[:, :1] == torch.arange(aligned)).all())
    assert not torch.equal(order, order.sort().values)
