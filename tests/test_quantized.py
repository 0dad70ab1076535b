"""Quantized weights, of 8 bits and fewer, stay as they are, and what is done with them stays exact.

In the manner of the libraries that make them: a parameter or buffer with its scale beside it, packed nibbles, a tensor
subclass, torch's own quantized modules.
"""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd
from pifa_compile.errors import PifaError

N, M = 32, 48


class Float8(nn.Linear):
    """As in checkpoints in float8: the parameter of a linear layer, which its class scales."""

    def __init__(self) -> None:
        super().__init__(N, M)
        self.scale = nn.Buffer(self.weight.detach().abs().amax() / 448)
        self.weight = nn.Parameter((self.weight / self.scale).detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Float8Product(Float8):
    """The same with the product in float8."""

    def forward(self, x: Tensor) -> Tensor:
        one, x8 = torch.ones((), device=x.device), x.to(self.weight.dtype)
        y = torch._scaled_mm(x8, self.weight.t(), scale_a=one, scale_b=self.scale, out_dtype=torch.bfloat16)
        return y.to(x.dtype) + self.bias


class Int8(nn.Linear):
    def __init__(self) -> None:
        super().__init__(N, M)
        self.scale = nn.Buffer(self.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((self.weight / self.scale).detach().round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Int8Buffer(nn.Module):
    """A module of its own, the weight a buffer."""

    def __init__(self) -> None:
        super().__init__()
        made = Int8()
        self.weight, self.scale = nn.Buffer(made.weight.detach()), nn.Buffer(made.scale[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Int8Product(Int8Buffer):
    """What it reads is rounded too, and the product is one of whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax() / 127
        return torch._int_mm((x / step).round().to(torch.int8), self.weight.t()).to(x.dtype) * self.scale * step


class Int4Packed(nn.Module):
    """Two numbers in a byte."""

    def __init__(self) -> None:
        super().__init__()
        q = torch.randint(0, 16, (M, N), dtype=torch.uint8)
        self.qweight, self.scale = nn.Buffer(q[:, ::2] | q[:, 1::2] << 4), nn.Buffer(torch.rand(M, 1) / 50)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.stack([self.qweight & 15, self.qweight >> 4], -1).flatten(1)
        return F.linear(x, (q.to(x.dtype) - 8) * self.scale)


LAYERS = {
    Float8: ("0", "computed in the graph .* from 0.weight, torch.float8_e4m3fn"),
    Float8Product: ("0", "torch.float8_e4m3fn weight: only float64"),
    Int8: ("0", "computed in the graph .* from 0.weight, torch.int8"),
    Int8Buffer: ("0", "computed in the graph .* from 0.weight, torch.int8"),
    Int8Product: ("0", "torch.int8 weight: only float64"),
    Int4Packed: ("0.qweight", "computed in the graph .* from 0.qweight, torch.uint8"),
}


@pytest.fixture
def x():
    return torch.randn(32, N)  # as many rows as a product of int8 needs


def beside(layer: nn.Module) -> nn.Sequential:
    """A quantized layer and one that is none."""
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(M, N)).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_quantized_layer_stays_exactly_what_it_is(store, x, kind):
    model = beside(kind())
    run = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False).run
    assert [r.name for r in run.layers if r.object] == ["2"]
    assert all(kind.__name__ in r.reason or "weight: only float64" in r.reason for r in run.layers if not r.object)
    prepared = pifa_compile.apply_(copy.deepcopy(model))
    assert type(prepared[0]) is kind and isinstance(prepared[2], pifa_compile.PifaLinear)
    wanted = pifa_compile.restore_(copy.deepcopy(prepared))(x)
    assert torch.equal(prepared[0](x), model[0](x)) and torch.allclose(prepared(x), wanted, atol=1e-5)
    assert torch.allclose(torch.compile(model, backend="pifa", options={"inner": "eager"})(x), wanted, atol=1e-5)
    assert counters["pifa"]["replaced"] == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_the_dry_run_names_a_quantized_layer_and_its_dtype(store, x, kind):
    name, reason = LAYERS[kind]
    report = pifa_compile.dry_run(beside(kind()), x, options={"density": 0.6})
    rows = {row["name"]: row for row in report.rows}
    assert list(rows) == [name, "2"] and rows["2"]["state"] == "pifa"
    assert re.search(reason, rows[name]["reason"])


@pytest.mark.parametrize("kind", [Float8, Int8Product])
def test_a_first_call_compresses_what_is_beside_a_quantized_layer(store, x, kind):
    model = beside(kind())
    y = torch.compile(model, backend="pifa", options={"inner": "eager", "density": 0.6})(x)
    (run,) = store.runs()
    assert [r.name for r in run.layers] == ["2"] and counters["pifa"]["replaced"] == 1
    h = torch.relu(model[0](x))
    assert torch.allclose(y, F.linear(h, store.factors(run.layers[0]).weight(torch.float32), model[2].bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64])
def test_a_plain_layer_that_cannot_run_fails_as_it_does_by_itself(store, x, dtype):
    """Torch has no product of these dtypes: that is said, by torch, with us as without."""
    layer = nn.Linear(N, M)
    layer.weight = nn.Parameter((8 * layer.weight.detach()).to(dtype), requires_grad=False)
    model = beside(layer)
    run = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False).run
    assert run.by_name["0"].reason == f"{dtype} weight: only float64, float32, float16 and bfloat16 are replaced"
    for call in (model, torch.compile(model, backend="pifa", options={"inner": "eager"}), pifa_compile.apply_(model)):
        with pytest.raises(Exception, match="dtype"):
            call(x)
    assert type(model[0]) is nn.Linear


class Int8Weight(torch.Tensor):
    """A weight of int8 and a scale, in the manner of torchao: a wrapper subclass that computes when it is used."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Int8Weight(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)

        def dense(value):
            return value.values.to(value.scale.dtype) * value.scale if isinstance(value, cls) else value

        return func(*torch.utils._pytree.tree_map(dense, args), **(kwargs or {}))


def test_a_quantized_weight_of_a_tensor_subclass_stays_as_it_is(store):
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).eval().requires_grad_(False)
    weight = model[0].weight.data
    scale = weight.abs().amax(1, keepdim=True) / 127
    packed = Int8Weight((weight / scale).round().to(torch.int8), scale)
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    x = torch.randn(3, 32)
    report = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), progress=False)
    assert [r.object is not None for r in report.run.layers] == [False, True]
    assert "Int8Weight" in report.run.layers[0].reason
    last = pifa_compile.restore_(pifa_compile.apply_(nn.Sequential(copy.deepcopy(model[2]))))
    wanted = last(F.relu(model[0](x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.compile(model, backend="pifa", options={"inner": "eager"})(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert counters["pifa"]["replaced"] == 1


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantized_layers_stay_as_they_are(store):
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(3, 32)
    with pytest.raises(PifaError, match="no linear layer"):
        pifa_compile.compress(quantized, Svd(density=0.6), progress=False)
    with torch.no_grad():
        found = torch.compile(quantized, backend="pifa", options={"inner": "eager", "density": 0.6})(x)
        assert torch.equal(found, quantized(x))
    assert counters["pifa"]["replaced"] == 0
