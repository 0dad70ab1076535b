"""Weights that change after compilation: every way it is done, under every policy, and what runs in the meantime."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd
from pifa_compile.errors import StaleWeightError
from pifa_compile.staleness import Watch


def replace_parameter(model, other):
    model[0].weight = nn.Parameter(other[0].weight.detach().clone())


def load_assigned(model, other):
    model.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)


WAYS = {
    "in place": lambda model, other: model[0].weight.detach().copy_(other[0].weight),
    "in place under no_grad": lambda model, other: torch.no_grad()(model[0].weight.mul_)(2.0),
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "load_state_dict, assigned": load_assigned,
    "a new parameter": replace_parameter,
    "another data": lambda model, other: setattr(model[0].weight, "data", other[0].weight.detach().clone()),
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two models of one architecture, low-rank, both compressed at the same density."""
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48)).eval()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                m, n = layer.weight.shape
                layer.weight.copy_(torch.randn(m, 6) @ torch.randn(6, n) / 10)
        made.append(model)
    return made


def compiled(model, policy, **options):
    settings = {"inner": "eager", "staleness": policy, "density": 0.8, **options}
    return torch.compile(model, backend="pifa", options=settings)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_check_never_serves_old_factors_and_recompiles_from_the_new_weight(models, way, caplog):
    model, other = models
    x, f = torch.randn(5, 48), compiled(model, "check")
    old = f(x)
    assert torch.allclose(old, model(x), atol=1e-5)
    WAYS[way](model, other)
    expected = model(x)
    assert not torch.allclose(old, expected, atol=1e-2)
    first = f(x)
    assert torch.allclose(first, expected, atol=1e-5)
    for _ in range(3):
        assert torch.allclose(f(x), expected, atol=1e-5)
    assert counters["pifa"]["replaced"] == 4  # compiled twice, both times with all layers in factored form


@torch.no_grad()
def test_the_call_in_the_meantime_runs_the_dense_graph_and_says_so_once(models, caplog):
    model, other = models
    x, f = torch.randn(5, 48), compiled(model, "check")
    f(x)
    WAYS["in place"](model, other)
    with caplog.at_level(logging.WARNING, logger="pifa_compile"):
        y = f(x)
    assert torch.equal(y, model(x))  # the dense graph, to the bit
    assert caplog.text.count("has changed since it was compiled") == 1
    assert "0.weight" in caplog.text


@pytest.mark.parametrize("way", ["in place", "load_state_dict", "another data"])
@torch.no_grad()
def test_error_names_the_layer_and_the_way_out(models, way):
    model, other = models
    x, f = torch.randn(5, 48), compiled(model, "error")
    f(x)
    WAYS[way](model, other)
    with pytest.raises(StaleWeightError, match=r"0\.weight has changed.*compile it again"):
        f(x)


@pytest.mark.parametrize("way", ["load_state_dict, assigned", "a new parameter"])
@torch.no_grad()
def test_a_new_parameter_is_a_new_model_under_error_too(models, way):
    model, other = models
    x, f = torch.randn(5, 48), compiled(model, "error")
    f(x)
    WAYS[way](model, other)
    assert torch.allclose(f(x), model(x), atol=1e-5)


@torch.no_grad()
def test_off_serves_what_was_compiled(models):
    model, other = models
    x, f = torch.randn(5, 48), compiled(model, "off")
    old = f(x)
    WAYS["in place"](model, other)
    assert torch.equal(f(x), old)


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("policy", ["check", "error", "off"])
@torch.no_grad()
def test_blocks_of_one_class_have_factors_of_their_own_under_every_policy(models, policy):
    """Regional compilation: they share the function that Dynamo compiles."""
    x = torch.randn(5, 48)
    exact = [model(x) for model in models]
    blocks = [Block(model) for model in models]
    for block in blocks:
        block.compile(backend="pifa", options={"inner": "eager", "staleness": policy, "density": 0.8})
    for _ in range(2):
        assert all(torch.allclose(block(x), y, atol=1e-5) for block, y in zip(blocks, exact, strict=True))
    assert counters["pifa"]["replaced"] == 4


@torch.no_grad()
def test_with_a_named_run_the_new_weight_has_no_factors_and_runs_dense(models):
    model, other = models
    run = pifa_compile.compress(model, Svd(density=0.8), progress=False).run_id
    x = torch.randn(5, 48)
    f = torch.compile(model, backend="pifa", options={"inner": "eager", "run": run})
    f(x)
    WAYS["in place"](model, other)
    f(x)
    with pytest.warns(UserWarning, match="not in run"):
        y = f(x)
    assert torch.allclose(y, model(x), atol=1e-5)


@torch.no_grad()
def test_through_inductor_with_a_dynamic_batch(models):
    model, other = models
    f = torch.compile(model, backend="pifa", dynamic=True, options={"density": 0.8})
    f(torch.randn(3, 48))
    WAYS["load_state_dict"](model, other)
    for batch in (4, 9):
        x = torch.randn(batch, 48)
        assert torch.allclose(f(x), model(x), atol=1e-5)


@torch.no_grad()
def test_a_bias_may_change_freely_unless_it_was_folded(models):
    """That of the first layer stands in the graph in another order; that of the last one is read as it is."""
    model, _ = models
    x, f = torch.randn(5, 48), compiled(model, "error")
    f(x)
    model[-1].bias.add_(1.0)
    assert torch.allclose(f(x), model(x), atol=1e-5)
    model[0].bias.add_(1.0)
    with pytest.raises(StaleWeightError, match=r"0\.bias"):
        f(x)


@torch.no_grad()
def test_a_folded_bias_that_changes_is_taken_up(models):
    model, _ = models
    x, f = torch.randn(5, 48), compiled(model, "check")
    f(x)
    model[0].bias.add_(1.0)
    for _ in range(3):
        assert torch.allclose(f(x), model(x), atol=1e-5)


@torch.no_grad()
def test_a_prepared_model_serves_edited_factors_at_once(models):
    model, other = models
    for each in models:
        pifa_compile.compress(each, Svd(density=0.8), progress=False)
    prepared, source = pifa_compile.apply_(copy.deepcopy(model)), pifa_compile.apply_(copy.deepcopy(other))
    x = torch.randn(5, 48)
    f = torch.compile(prepared, backend="pifa", options={"inner": "eager"})
    f(x)
    prepared.load_state_dict(source.state_dict())
    for _ in range(3):
        assert torch.allclose(f(x), other(x), atol=1e-5)


def test_a_watch_holds_nothing_alive_and_takes_inference_tensors():
    import gc
    import weakref

    weight = nn.Parameter(torch.randn(4, 4))
    with torch.inference_mode():
        inference = torch.randn(4, 4)
    watch = Watch([("weight", weight), ("inference", inference)])
    assert watch.changed() is None
    reference = weakref.ref(weight)
    del weight
    gc.collect()
    assert reference() is None and watch.changed() == "weight"
