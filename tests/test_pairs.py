"""Low-rank pairs that a model already has: taken where that is exact, never where they are meant to stay."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Store, Svd

M, N, K = 40, 56, 16


class PairModel(nn.Module):
    """What SVD-LLM and its like leave: right then left, around an activation."""

    def __init__(self, inner_bias: bool = False, outer_bias: bool = True) -> None:
        super().__init__()
        self.right, self.left = nn.Linear(N, K, bias=inner_bias), nn.Linear(K, M, bias=outer_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.left(self.right(x)))


class Adapted(nn.Module):
    """A dense layer with an adapter beside it, as PEFT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(N, M), nn.Linear(N, 4, bias=False), nn.Linear(4, M, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        return result + self.b(self.a(self.dropout(x.to(self.a.weight.dtype)))) * 2.0


class Residual(PairModel):
    """A pair whose output is added to its own input: no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.left(self.right(x))


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


def run(model, x, **options):
    with torch.no_grad():
        return torch.compile(model, backend="pifa", options={"inner": "eager", **options})(x)


def close(y, model, x, bound=1e-5):
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    return float((y.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("inner_bias", [True, False])
@pytest.mark.parametrize("outer_bias", [True, False])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_pair_in_float32_becomes_one_layer_with_its_inner_bias(inner_bias, outer_bias, inner):
    model, x = PairModel(inner_bias, outer_bias).eval(), torch.randn(7, N)
    y = run(model, x, inner=inner)
    assert counters["pifa"]["replaced"] == 1
    assert close(y, model, x)


def test_both_dense_halves_and_their_biases_leave_the_graph():
    graphs = []

    def backend(gm, inputs):
        compiled = pifa_compile.pifa(gm, inputs, options={"inner": "eager"})
        graphs.append(gm.graph)
        return compiled

    with torch.no_grad():
        torch.compile(PairModel(inner_bias=True), backend=backend)(torch.randn(3, N))
    assert [n.name for n in graphs[0].find_nodes(op="placeholder") if "parameters" in n.name] == []


def test_a_pair_is_pivoted_once_for_all_processes():
    model, x = PairModel().eval(), torch.randn(7, N)
    first = run(model, x)
    torch._dynamo.reset()
    assert torch.equal(run(model, x), first)
    assert counters["pifa"]["factored"] == 1
    assert [r.header.recipe["method"] for r in Store().runs()] == ["pair"]


def test_a_residual_connection_does_not_make_an_adapter():
    model, x = Residual().eval(), torch.randn(7, N)
    assert close(run(model, x), model, x)
    assert counters["pifa"]["replaced"] == 1


def test_an_adapter_stays_and_only_its_dense_layer_is_replaced(tmp_path):
    model, x = Adapted().eval(), torch.randn(7, N)
    y = run(model, x, density=0.99, dump=tmp_path / "dump")
    assert counters["pifa"]["replaced"] == 1
    (table,) = (tmp_path / "dump").glob("*/linears.json")
    rows = {row["name"]: row for row in json.loads(table.read_text())["linears"]}
    assert rows["base"]["state"] == "pifa"
    assert "adapter" in rows["a"]["reason"] and "adapter" in rows["b"]["reason"]
    assert y.shape == (7, M)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bit_only_on_request(dtype):
    model, x = PairModel().eval().to(dtype), torch.randn(7, N, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(run(model, x), expected)
    assert counters["pifa"]["replaced"] == 0
    torch._dynamo.reset()
    y = run(model, x, pairs=True)
    assert counters["pifa"]["replaced"] == 1
    assert close(y, model, x, 5e-2 if dtype == torch.bfloat16 else 1e-2)


def test_under_autocast_a_pair_stays_one_and_says_why():
    model, x = PairModel().eval(), torch.randn(7, N)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(run(model, x), model(x))
        rows = pifa_compile.dry_run(model, x).rows
    assert [row["reason"] for row in rows] == ["half of a low-rank pair whose dtypes differ"] * 2
    assert counters["pifa"]["replaced"] == 0


def test_pairs_false_leaves_them_alone_in_float32_too():
    model, x = PairModel().eval(), torch.randn(7, N)
    run(model, x, pairs=False)
    assert counters["pifa"]["replaced"] == 0


def test_no_pair_where_something_else_reads_the_middle_or_nothing_is_saved():
    class Read(PairModel):
        def forward(self, x):
            h = self.right(x)
            return self.left(h).sum() + h.sum()

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.right, self.left = nn.Linear(N, N), nn.Linear(N, M)

        def forward(self, x):
            return self.left(self.right(x))

    class Thin(Wide):
        def __init__(self):
            super().__init__()
            self.right, self.left = nn.Linear(N, 2), nn.Linear(2, M)  # pivoting would save 2 of 192 numbers

    for model in (Read(), Wide(), Thin()):
        torch._dynamo.reset()
        run(model.eval(), torch.randn(3, N))
    assert counters["pifa"]["replaced"] == 0


def test_a_pair_kept_as_a_pair_by_its_run_stays_one_in_prepared_form():
    model, x = nn.Sequential(nn.Linear(N, M)).eval(), torch.randn(3, N)
    pifa_compile.compress(model, Svd(density=0.5, form="pair"), progress=False)
    prepared = pifa_compile.apply_(model)
    with torch.no_grad():
        expected = prepared(x)
    assert torch.equal(run(prepared, x), expected)
    assert counters["pifa"]["replaced"] == 0


def test_the_dry_run_plans_a_pair_and_writes_nothing(tmp_path):
    report = pifa_compile.dry_run(PairModel().eval(), torch.randn(3, N))
    rows = {row["name"]: row for row in report.rows}
    assert rows["left"]["state"] == "pifa" and rows["left"]["shape"] == [M, N] and rows["left"]["rank"] == K
    assert "folded" in rows["right"]["reason"]
    assert not (tmp_path / "store").exists()


@torch.no_grad()
def test_a_changed_half_or_inner_bias_is_not_served_stale():
    model, x = PairModel(inner_bias=True).eval(), torch.randn(7, N)
    f = torch.compile(model, backend="pifa", options={"inner": "eager"})
    f(x)
    for parameter in (model.right.weight, model.right.bias, model.left.bias):
        parameter.mul_(1.5)
        for _ in range(2):
            assert close(f(x), model, x)
