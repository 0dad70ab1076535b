"""Right, or refused with a line that says why: function transforms, quantized and foreign weights, wrong pairings."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd, cli
from pifa_compile.errors import InputError, NoRunError, PifaError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture
def model(store):
    made = Block().eval().requires_grad_(False)
    pifa_compile.compress(made, Svd(density=0.6, rank_multiple=1), progress=False)
    return made


@pytest.fixture
def exact(model):
    """The dense model with the weights that the factors stand for."""
    return pifa_compile.restore_(pifa_compile.apply_(copy.deepcopy(model)))


def variants(model):
    """The three ways to run it."""
    prepared = pifa_compile.apply_(copy.deepcopy(model))
    return {
        "transparent": torch.compile(model, backend="pifa", options={"inner": "eager"}),
        "prepared": prepared,
        "prepared and compiled": torch.compile(prepared, backend="pifa", options={"inner": "eager"}),
    }


WAYS = ("transparent", "prepared", "prepared and compiled")


# --- transforms of functions -----------------------------------------------------------------------------------------


def uncompiled(model, exact, way):
    """What runs inside of a transform: torch compiles nothing there, so the untouched model is the dense one."""
    return model if way == "transparent" else exact


@pytest.mark.parametrize("way", WAYS)
def test_vmap(model, exact, way):
    xs, found = torch.randn(4, 3, 32), variants(model)[way]
    assert torch.allclose(torch.vmap(found)(xs), uncompiled(model, exact, way)(xs), atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_by_torch_func(model, exact, way):
    x, found = torch.randn(3, 32), variants(model)[way]
    gradient = torch.func.grad(lambda x: found(x).square().sum())(x)
    wanted = torch.func.grad(lambda x: uncompiled(model, exact, way)(x).square().sum())(x)
    assert torch.allclose(gradient, wanted, atol=1e-4)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
@pytest.mark.parametrize("prepared", [False, True])
def test_transforms_inside_of_what_is_compiled(model, exact, transform, prepared):
    used = pifa_compile.apply_(copy.deepcopy(model)) if prepared else model

    def call(module, xs):
        if transform == "vmap":
            return torch.vmap(module)(xs)
        return torch.func.grad(lambda x: module(x).square().sum())(xs)

    xs = torch.randn(4, 3, 32)
    found = torch.compile(lambda xs: call(used, xs), backend="pifa", options={"inner": "eager"})(xs)
    assert torch.allclose(found, call(exact, xs), atol=1e-4)


def test_functional_call_with_other_weights_uses_these(model):
    """The factors belong to the weights that were compressed; weights that are handed in are others."""
    x, others = torch.randn(3, 32), {name: torch.randn_like(p) / 8 for name, p in model.named_parameters()}
    compiled = torch.compile(model, backend="pifa", options={"inner": "eager"})
    own = compiled(x)
    names = {f"_orig_mod.{name}": value for name, value in others.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.func.functional_call(compiled, names, (x,))
    assert torch.allclose(found, torch.func.functional_call(model, others, (x,)), atol=1e-5)
    assert torch.equal(compiled(x), own)


def test_functional_call_of_a_prepared_model(model):
    prepared, x = pifa_compile.apply_(model), torch.randn(3, 32)
    doubled = {name: 2 * p if "pivot_rows" in name else p for name, p in prepared.named_parameters()}
    other = copy.deepcopy(prepared)
    other.load_state_dict(doubled, strict=False)
    assert torch.allclose(torch.func.functional_call(prepared, doubled, (x,)), other(x), atol=1e-6)
    compiled = torch.compile(
        lambda x: torch.func.functional_call(prepared, doubled, (x,)), backend="pifa", options={"inner": "eager"}
    )
    assert torch.allclose(compiled(x), other(x), atol=1e-6)


# --- weights that are no plain floating point matrices ---------------------------------------------------------------


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


@pytest.mark.parametrize("way", WAYS)
def test_inputs_of_another_dtype_are_refused_as_a_dense_layer_refuses_them(model, way):
    x = torch.randn(3, 32, dtype=torch.float16)
    with pytest.raises(Exception, match=r"dtype|Half"):
        model(x)
    with pytest.raises(Exception, match=r"dtype|Half|float16"):
        variants(model)[way](x)


def test_a_model_on_the_meta_device_is_refused_or_runs_on_meta(model):
    empty = copy.deepcopy(model).to("meta")
    with pytest.raises(NoRunError):
        pifa_compile.apply_(empty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.compile(empty, backend="pifa", options={"inner": "eager"})(torch.randn(3, 32, device="meta"))
    assert y.is_meta and y.shape == (3, 32)


# --- a model and a run that do not belong together -------------------------------------------------------------------


def test_a_run_of_another_model_changes_nothing(model, store):
    other, x = Block().eval(), torch.randn(3, 32)
    (run,) = store.runs()
    with pytest.raises(NoRunError, match="no run knows a weight of this model"):
        pifa_compile.apply_(other, run=run.header.run_id)
    assert isinstance(other.up, nn.Linear)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="2 of 2 linear layers stay dense.*is not in run"):
            y = torch.compile(other, backend="pifa", options={"run": run.header.run_id, "inner": "eager"})(x)
        assert torch.equal(y, other(x))
        report = pifa_compile.dry_run(other, x, options={"run": run.header.run_id})
    assert all("is not in run" in row["reason"] for row in report.rows)


def test_a_run_that_knows_a_part_of_the_model_serves_that_part(model, store):
    mixed, x = copy.deepcopy(model), torch.randn(3, 32)
    mixed.down = nn.Linear(64, 32).requires_grad_(False)
    wanted = pifa_compile.restore_(pifa_compile.apply_(copy.deepcopy(mixed)))(x)
    with pytest.warns(UserWarning, match="1 of 2 linear layers stay dense.*is not in run"):
        found = torch.compile(mixed, backend="pifa", options={"inner": "eager"})(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert counters["pifa"]["replaced"] == 1


def test_load_names_a_layer_that_the_model_lacks(model, language_folder, store):
    (run,) = store.runs()
    with pytest.raises(InputError, match="has layers that LlamaForCausalLM has not: down, up"):
        pifa_compile.load(language_folder, run=run.header.run_id)


# --- calibration files that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd-llm", "mpifa"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"x", "the text has 1 tokens, less than one window"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "is no UTF-8 text"),
        (b"\x00" * 4096, "is no text: it has zero bytes"),
    ],
)
def test_a_calibration_file_that_is_none_is_a_line(language_folder, tmp_path, capsys, content, problem, method):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    arguments = ["compress", str(language_folder), "--density", "0.5", "--method", method, "--text", str(file)]
    assert cli.main([*arguments, "--store", str(tmp_path / "elsewhere")]) == cli.FAILED
    out, err = capsys.readouterr()
    (line,) = (line for line in err.splitlines() if line.startswith("pifa: error: "))
    assert problem in line and out == "" and "Traceback" not in err
    assert not (tmp_path / "elsewhere").exists()
