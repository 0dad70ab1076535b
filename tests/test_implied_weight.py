"""The weight that a factored layer gives to those who look: its facts for nothing, its content where it is used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pifa_compile
from pifa_compile import Svd
from pifa_compile.errors import ImpliedWeightError
from pifa_compile.implied_weight import ImpliedWeight


class Kinds(nn.Module):
    """A linear layer, a 1x1 convolution and GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.linear, self.convolution, self.transposed = nn.Linear(32, 48), nn.Conv2d(48, 40, 1), Conv1D(24, 40)


KINDS = ("linear", "convolution", "transposed")


@pytest.fixture(params=["pifa", "pair"])
def models(request, store):
    """Dense from the factors, and prepared."""
    model = Kinds().eval()
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1, form=request.param), progress=False)
    prepared = pifa_compile.apply_(model)
    return pifa_compile.restore_(copy.deepcopy(prepared)), prepared


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_its_facts_are_those_of_the_dense_weight_and_cost_nothing(models, kind, dtype, monkeypatch):
    dense, prepared = (getattr(model.to(dtype), kind) for model in models)
    monkeypatch.setattr(type(prepared), "_dense", None)  # nothing is computed
    weight = prepared.weight
    assert isinstance(weight, torch.Tensor) and isinstance(weight, ImpliedWeight)
    assert weight.shape == dense.weight.shape and weight.size(0) == dense.weight.size(0)
    assert (weight.dtype, weight.device, weight.dim()) == (dtype, dense.weight.device, dense.weight.dim())
    assert weight.numel() == dense.weight.numel() and weight.is_floating_point() and not weight.is_meta
    assert prepared.state_dict().keys().isdisjoint({"weight"})


@pytest.mark.parametrize("kind", KINDS)
def test_its_content_is_the_product_of_the_factors(models, kind):
    dense, prepared = (getattr(model, kind) for model in models)
    assert torch.allclose(prepared.weight + 0, dense.weight, atol=1e-6)
    assert type(prepared.weight * 2) is torch.Tensor
    matrix = prepared.weight.flatten(1)
    x = torch.randn(3, matrix.shape[1])
    assert torch.allclose(F.linear(x, matrix), F.linear(x, dense.weight.flatten(1)), atol=1e-5)
    assert torch.allclose(torch.stack([prepared.weight, prepared.weight])[1], dense.weight, atol=1e-6)


def test_gradients_go_into_the_factors(store):
    model = nn.Sequential(nn.Linear(32, 48))
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False)
    layer = pifa_compile.apply_(model, trainable=True)[0]
    x = torch.randn(5, 32)
    layer(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    F.linear(x, layer.weight, layer.bias).square().sum().backward()
    assert all(torch.allclose(p.grad, wanted[name], atol=1e-4) for name, p in layer.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.zeros_like(w)),
        lambda w: nn.init.normal_(w),
        lambda w: w.data,
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.requires_grad_(),
    ],
)
def test_it_cannot_be_written_to(models, change):
    with torch.no_grad(), pytest.raises(ImpliedWeightError, match=r"restore_\(model\)"):
        change(models[1].linear.weight)


def test_a_model_that_asks_for_a_dtype_compiles_without_the_dense_weight(models):
    """As T5 does. What nobody reads is dropped: the program has the two products of the factors and no third."""
    from torch._inductor.utils import run_and_get_code

    class Asks(nn.Module):
        def __init__(self, layer) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if isinstance(self.layer.weight, torch.Tensor) and x.dtype != self.layer.weight.dtype:
                x = x.to(self.layer.weight.dtype)
            return self.layer(x)

    dense, prepared = (Asks(model.linear) for model in models)
    x = torch.randn(600, 32, dtype=torch.float64)  # more tokens than one call of a kernel serves
    with torch.no_grad():
        compiled = torch.compile(prepared, backend="pifa", fullgraph=True)
        y, (code, *_) = run_and_get_code(compiled, x)
        assert torch.allclose(prepared(x), dense(x), atol=1e-5) and torch.allclose(y, dense(x), atol=1e-5)
    assert code.count("extern_kernels.mm(") + code.count("extern_kernels.addmm(") == 2
