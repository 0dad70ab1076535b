"""Habits of real users: regional compilation, graph breaks, threads, determinism, two models, modes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd
from pifa_compile.kernels.few_tokens import available


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    made = Breaking().eval()
    pifa_compile.compress(made, Svd(density=0.7), progress=False)
    return made


def expected(model, x):
    with torch.no_grad():
        return pifa_compile.apply_(copy.deepcopy(model))(x)


@torch.no_grad()
def test_graph_breaks(model):
    x = torch.randn(3, 48)
    y = torch.compile(model, backend="pifa", options={"inner": "eager"})(x)
    assert torch.allclose(y, expected(model, x), atol=1e-5)
    assert counters["pifa"]["replaced"] == 6 and counters["pifa"]["skipped"] == 0


@pytest.mark.parametrize("regional", [True, False])
@torch.no_grad()
def test_more_blocks_of_one_class_than_dynamo_recompiles_a_function(model, regional):
    """Every block has factors of its own, so each is compiled: none may run dense because of a limit."""
    model.blocks.extend(Block().eval() for _ in range(9))
    pifa_compile.compress(model, Svd(density=0.6), progress=False)
    x = torch.randn(3, 48)
    exact = pifa_compile.apply_(copy.deepcopy(model), density=0.6)(x)
    options = {"inner": "eager", "density": 0.6}
    if regional:
        for block in model.blocks:
            block.compile(backend="pifa", options=options)
    compiled = model if regional else torch.compile(model, backend="pifa", options=options)
    for _ in range(2):
        assert torch.allclose(compiled(x), exact, atol=1e-5)
    assert counters["pifa"]["replaced"] == 24


@pytest.mark.skipif(not available(torch.float32), reason="no kernel for few tokens here")
@torch.no_grad()
def test_prepared_blocks_share_code_where_no_order_is_in_it(model):
    """With few tokens, factors are inputs of the graph, as dense weights are; an order that was spelled out is not."""
    prepared = pifa_compile.apply_(copy.deepcopy(model))
    prepared.blocks = nn.ModuleList(copy.deepcopy(prepared.blocks[0]) for _ in range(3))  # of equal ranks
    for layer in (layer for block in prepared.blocks for layer in (block.up, block.down)):
        layer.pivot_rows.normal_()
        layer.row_order.copy_(torch.randperm(layer.out_features))
        layer.gather_order.copy_(torch.argsort(layer.row_order))
    calls = {tokens: torch.randn(tokens, 48) for tokens in (1, 700)}
    wanted = {tokens: prepared(x) for tokens, x in calls.items()}
    for tokens, compilations in ((1, 1), (700, len(prepared.blocks))):
        torch._dynamo.reset()
        counters.clear()
        for block in prepared.blocks:
            block.compile(backend="pifa", dynamic=False)
        for _ in range(2):
            assert torch.allclose(prepared(calls[tokens]), wanted[tokens], rtol=1e-4)
        assert counters["stats"]["unique_graphs"] == compilations


@torch.no_grad()
def test_two_models_and_one_model_twice_with_different_options(model, tmp_path):
    other = copy.deepcopy(model)
    x = torch.randn(3, 48)
    run = pifa_compile.compress(other, Svd(density=0.4), progress=False).run_id
    first = torch.compile(model, backend="pifa", options={"density": 0.7, "inner": "eager"})
    second = torch.compile(other, backend="pifa", options={"run": run, "inner": "eager"})
    coarse, fine = second(x), first(x)
    assert torch.allclose(fine, pifa_compile.apply_(copy.deepcopy(model), density=0.7)(x), atol=1e-5)
    assert torch.allclose(coarse, pifa_compile.apply_(copy.deepcopy(model), run=run)(x), atol=1e-5)
    assert not torch.allclose(coarse, fine, atol=1e-3)


@torch.no_grad()
def test_one_model_compiled_twice_with_different_options_takes_turns(model):
    """Dynamo keeps what it compiled by the function, not by who compiled it: each must find its own again."""
    x = torch.randn(3, 48)
    pifa_compile.compress(model, Svd(density=0.4), progress=False)
    ways = [{"density": 0.7}, {"density": 0.4}, {"density": 0.7, "skip": ["*down"]}]
    compiled = [torch.compile(model, backend="pifa", options={"inner": "eager", **options}) for options in ways]
    first = [each(x) for each in compiled]
    assert torch.allclose(first[0], pifa_compile.apply_(copy.deepcopy(model), density=0.7)(x), atol=1e-5)
    assert torch.allclose(first[1], pifa_compile.apply_(copy.deepcopy(model), density=0.4)(x), atol=1e-5)
    assert all(not torch.allclose(first[i], first[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))
    graphs = counters["stats"]["unique_graphs"]
    for each, y in [*zip(compiled, first, strict=True)][::-1]:
        assert torch.equal(each(x), y)
    assert counters["stats"]["unique_graphs"] == graphs


def test_threads_that_compile_at_once(model):
    x, found = torch.randn(3, 48), []
    exact = expected(model, x)
    compiled = torch.compile(model, backend="pifa", options={"inner": "eager"})

    def call():
        with torch.no_grad():
            found.append(compiled(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.allclose(y, exact, atol=1e-5) for y in found)


@torch.no_grad()
def test_deterministic_algorithms(model):
    x = torch.randn(3, 48)
    torch.use_deterministic_algorithms(True)
    try:
        compiled = torch.compile(model, backend="pifa")
        assert torch.equal(compiled(x), compiled(x))
        assert torch.allclose(compiled(x), expected(model, x), atol=1e-5)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_modes_on_a_prepared_model(model, mode):
    x = torch.randn(3, 48)
    prepared = pifa_compile.apply_(model)
    y = torch.compile(prepared, backend="pifa", mode=mode)(x)
    assert torch.allclose(y, prepared(x), atol=1e-5)


def test_an_adapter_of_peft_s_shape_around_a_compressed_layer(model):
    """As PEFT wraps it: names change, the base layer's content does not; the adapter's halves stay and are trained."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.lora_A, self.lora_B = nn.Linear(48, 8, bias=False), nn.Linear(8, 96, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 2.0

    block = model.blocks[0].requires_grad_(False)
    block.up = Adapted(block.up)
    x = torch.randn(3, 48)
    y = torch.compile(block, backend="pifa", options={"inner": "eager"})(x)
    y.sum().backward()
    assert counters["pifa"]["replaced"] == 2
    assert block.up.lora_A.weight.grad is not None
