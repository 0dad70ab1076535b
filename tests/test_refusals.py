"""Right, or refused with a line that says why: function transforms, dtypes, devices, options, wrong pairings."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd, SvdLlm, cli
from pifa_compile.errors import InputError, NoRunError


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


# --- dtypes and devices that differ -----------------------------------------------------------------------------------


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


class Chain(nn.Module):
    """Layers of different dtypes one after the other, each given what it reads in its own."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, dtype=dtype) for dtype in dtypes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x


@pytest.mark.parametrize("density", [None, 0.6])
def test_layers_of_different_dtypes_are_replaced_each_in_its_own(store, density):
    """From a run of the whole model, or of the first call."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    chain, x = Chain(*dtypes).eval().requires_grad_(False), torch.randn(64, 32)
    options = {"inner": "eager"}
    if density is None:
        pifa_compile.compress(chain, Svd(density=0.6, rank_multiple=1), progress=False)
    else:
        options["density"] = density
    y = torch.compile(chain, backend="pifa", options=options)(x)
    assert counters["pifa"]["replaced"] == 4 and y.dtype == torch.float64
    (run,) = store.runs()
    assert [store.factors(r).dtype for r in run.layers] == list(dtypes)
    if density is None:
        dense = pifa_compile.restore_(pifa_compile.apply_(copy.deepcopy(chain)))
        assert [layer.weight.dtype for layer in dense.layers] == list(dtypes)
        assert torch.allclose(y, dense(x), atol=2e-2)


class Parted(nn.Module):
    """One layer is on the meta device; what it reads goes there, if it reads anything."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, device="meta")
        self.used = used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.up(x))
        return self.down(h.to("meta")) if self.used else h


@pytest.mark.parametrize("used", [False, True])
def test_a_layer_on_the_meta_device_stays_there_and_the_others_are_replaced(store, used):
    parted, x = Parted(used).eval().requires_grad_(False), torch.randn(8, 32)
    run = pifa_compile.compress(parted, Svd(density=0.6, rank_multiple=1), progress=False).run
    assert [r.object is not None for r in run.layers] == [True, False]
    assert "on meta" in run.by_name["down"].reason
    y = torch.compile(parted, backend="pifa", options={"inner": "eager"})(x)
    assert y.is_meta == used and counters["pifa"]["replaced"] == 1
    rows = {row["name"]: row for row in pifa_compile.dry_run(parted, x).rows}
    if used:
        assert rows["down"]["reason"] == "the weight is on the meta device and has no content"
    prepared = pifa_compile.apply_(copy.deepcopy(parted))
    assert isinstance(prepared.up, pifa_compile.PifaLinear) and prepared.down.weight.is_meta
    assert used or torch.allclose(y, pifa_compile.restore_(copy.deepcopy(prepared))(x), atol=1e-5)
    with pytest.raises(
        InputError, match=r"down\.weight is on the meta device and has no content.*load the whole model"
    ):
        pifa_compile.compress(parted, SvdLlm(density=0.6), text=[x], progress=False)


@pytest.mark.parametrize("recipe", [Svd(density=0.6), SvdLlm(density=0.6)], ids=lambda r: r.method)
def test_a_device_that_cannot_compute_is_refused(model, recipe):
    text = [torch.randn(8, 32)] if recipe.method == "svd-llm" else None
    for device, problem in (("meta", "nothing can be computed there"), ("nowhere", "device type")):
        with pytest.raises(InputError, match=f"device '{device}': .*{problem}.*leave it out"):
            pifa_compile.compress(model, recipe, text=text, device=device, progress=False)


def test_a_method_without_data_computes_where_the_weights_are(model, store, monkeypatch):
    """Another device is refused and not ignored; the same one is no other."""
    import pifa_compile.compression as compression

    report = pifa_compile.compress(model, Svd(density=0.4, rank_multiple=1), device="cpu", progress=False)
    assert all(r.object for r in report.run.layers)
    monkeypatch.setattr(compression, "_device", lambda given: torch.device("cuda", 0))
    with pytest.raises(
        InputError, match="method 'svd' computes where the weights are, on cpu; leave device='cuda:0' out"
    ):
        pifa_compile.compress(model, Svd(density=0.4), device="cuda", progress=False)


# --- densities and options that cannot be ----------------------------------------------------------------------------


def asked(model, x, **options):
    """The three verbs that choose a run by options."""
    compiled = torch.compile(model, backend="pifa", options={"inner": "eager", **options})
    return {
        "apply_": lambda: pifa_compile.apply_(copy.deepcopy(model), **options),
        "dry_run": lambda: pifa_compile.dry_run(model, x, options=options),
        "compile": lambda: compiled(x),
    }


@pytest.mark.parametrize("verb", ["apply_", "dry_run", "compile"])
@pytest.mark.parametrize("density", [0, 1, 1.5, -0.5, float("nan"), float("inf"), "1.5", "half", True])
def test_an_impossible_density_is_refused_by_every_verb(model, store, verb, density):
    with pytest.raises(Exception, match=r"density is .*; it is the fraction of parameters that is kept"):
        asked(model, torch.randn(3, 32), density=density)[verb]()
    assert isinstance(model.up, nn.Linear) and len(store.runs()) == 1


@pytest.mark.parametrize("verb", ["apply_", "dry_run", "compile"])
def test_a_density_may_be_written_as_text(model, verb):
    found = asked(model, x := torch.randn(3, 32), density="0.6")[verb]()
    if verb == "compile":
        assert torch.equal(found, asked(model, x, density=0.6)["compile"]())
    rows = found.rows if verb == "dry_run" else ()
    assert [row["state"] for row in rows] == ["pifa"] * len(rows)
    assert verb != "apply_" or isinstance(found.up, pifa_compile.PifaLinear)


@pytest.mark.parametrize("verb", ["apply_", "dry_run", "compile"])
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"run": "svd", "density": 0.6}, "both choose the compression run"),
        ({"run": "svd", "method": "svd"}, "both choose the compression run"),
        ({"method": "svd"}, "needs a density beside it"),
        ({"density": 0.6, "method": "svdd"}, "did you mean 'svd'"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_every_verb(model, verb, options, problem):
    with pytest.raises(Exception, match=problem):
        asked(model, torch.randn(3, 32), **options)[verb]()
    assert isinstance(model.up, nn.Linear)


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


def test_one_sentence_calibrates_an_encoder_roughly_and_says_so(encoder_folder, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("x")
    arguments = ["compress", str(encoder_folder), "--density", "0.5", "--method", "svd-llm", "--text", str(file)]
    assert cli.main(arguments) == cli.DONE
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("pifa: warning: "))
    assert "the calibration text has at most 1 tokens for 13 of 13 layers" in warning and "longer text" in warning
    file.write_text("enough words for the widest of its layers\n" * 24)  # a pooler reads one token of each
    assert cli.main(arguments) == cli.DONE
    assert "pifa: warning" not in capsys.readouterr().err
