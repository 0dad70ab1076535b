"""Prepared mode: modules that own factors, dense weights gone or never made, and every round trip of a module."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import PifaLinear, Svd
from pifa_compile.errors import DamagedError, InputError, NoRunError
from pifa_compile.modules import PairLinear
from pifa_compile.prepare import empty_model
from pifa_compile.recipes import Joint
from pifa_compile.store import Store
from pifa_compile.store.objects import object_path


class Mixed(nn.Module):
    """A linear layer, a 1x1 convolution and GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.linear, self.convolution, self.transposed = nn.Linear(32, 48), nn.Conv2d(48, 40, 1), Conv1D(24, 40)
        self.norm = nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).transpose(1, 2).unflatten(-1, (-1, 2))
        return self.norm(self.transposed(self.convolution(y).flatten(2).transpose(1, 2)))


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


def compressed(model, **settings):
    settings = {"density": 0.6, "rank_multiple": 1} | settings
    pifa_compile.compress(model.eval(), Svd(**settings), progress=False)
    return model


def oracle(model, x):
    """The compressed model in float64, dense from its factors."""
    dense = pifa_compile.restore_(pifa_compile.apply_(copy.deepcopy(model))).double()
    with torch.no_grad():
        return dense(x.double())


def relative(a, b):
    return float((a.detach().double() - b).norm() / b.norm())


@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_modules_of_every_kind_become_factored_and_dense_weights_are_gone(form):
    model, x = compressed(Mixed(), form=form), torch.randn(3, 8, 32)
    exact = oracle(model, x)
    gone = [weakref.ref(m.weight) for m in (model.linear, model.convolution, model.transposed)]
    assert pifa_compile.apply_(model) is model
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    kind = PifaLinear if form == "pifa" else PairLinear
    assert all(isinstance(m, kind) for m in (model.linear, model.convolution, model.transposed))
    with torch.no_grad():
        assert relative(model(x), exact) < 1e-5


def test_a_model_whose_last_factors_are_damaged_is_as_it_was(tmp_path):
    model = compressed(Mixed())
    modules, state = dict(model.named_modules()), {name: t.data_ptr() for name, t in model.state_dict().items()}
    (run,) = Store().runs()
    path = object_path(Store().root, run.layers[-1].object)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match=r"^transposed: .*make it again with pifa_compile\.compress\(MODEL"):
        pifa_compile.apply_(model)
    assert dict(model.named_modules()) == modules
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == state


def test_the_memory_of_factors_that_were_read_can_be_given_back():
    model = pifa_compile.apply_(compressed(Mixed()))
    storage = model.linear.pivot_rows.untyped_storage()
    assert storage.resizable()


@pytest.mark.parametrize("backend", ["pifa", "inductor", "eager", "aot_eager"])
def test_prepared_models_compile_with_any_backend(backend):
    model, x = compressed(Mixed()), torch.randn(3, 8, 32)
    exact = oracle(model, x)
    prepared = pifa_compile.apply_(model)
    with torch.no_grad():
        y = torch.compile(prepared, backend=backend, fullgraph=True)(x)
    assert relative(y, exact) < 1e-5
    if backend == "pifa":
        assert counters["pifa"]["prepared"] == 3 and counters["pifa"]["skipped"] == 0


@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_what_the_run_of_a_prepared_model_left_dense_stays_so_whatever_else_is_in_the_store(form):
    model, x = compressed(Mixed(), form=form, skip=["transposed"]), torch.randn(3, 8, 32)
    (own,) = Store().runs()
    other = pifa_compile.compress(model, Svd(density=0.3, rank_multiple=1), progress=False).run
    weight = model.transposed.weight
    prepared = pifa_compile.apply_(model, run=own.run_id)
    assert prepared.transposed.weight is weight
    with torch.no_grad():
        expected = prepared(x)
        compiled = torch.compile(prepared, backend="pifa", options={"inner": "eager"}, fullgraph=True)
        assert relative(compiled(x), expected.double()) < 1e-6
        assert counters["pifa"]["replaced"] == 0
        torch._dynamo.reset()
        named = torch.compile(prepared, backend="pifa", options={"inner": "eager", "run": other.run_id}, fullgraph=True)
        assert relative(named(x), expected.double()) > 1e-3
        assert counters["pifa"]["replaced"] == 1


def test_state_dict_deepcopy_and_pickle_round_trips():
    model, x = compressed(Mixed()), torch.randn(3, 8, 32)
    prepared = pifa_compile.apply_(model)
    with torch.no_grad():
        expected = prepared(x)
        assert torch.equal(copy.deepcopy(prepared)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(prepared))(x), expected)
        other = pifa_compile.apply_(compressed(Mixed()))
        assert not torch.allclose(other(x), expected)
        other.load_state_dict(prepared.state_dict())  # row orders differ: the gather must follow
        assert torch.equal(other(x), expected)
        assert torch.equal(torch.compile(other, backend="pifa", options={"inner": "eager"})(x), expected)
    names = set(prepared.linear.state_dict())
    assert names == {"pivot_rows", "coefficients", "row_order", "bias"}


def test_a_prepared_model_that_is_edited_changes_no_other():
    model, x = compressed(nn.Sequential(nn.Linear(32, 48))), torch.randn(3, 32)
    first, second = (pifa_compile.apply_(copy.deepcopy(model)) for _ in range(2))
    with torch.no_grad():
        transparent = torch.compile(model, backend="pifa", options={"inner": "eager"})
        expected, compiled = second(x), transparent(x)
        first[0].pivot_rows.mul_(2.0)
        assert not torch.allclose(first(x), expected)
        assert torch.equal(second(x), expected) and torch.equal(transparent(x), compiled)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts(cast):
    model, x = compressed(Mixed()), torch.randn(3, 8, 32)
    exact = oracle(model, x)
    prepared = getattr(pifa_compile.apply_(model), cast)()
    dtype = prepared.linear.pivot_rows.dtype
    assert prepared.linear.row_order.dtype == torch.int32 and prepared.linear.gather_order.dtype == torch.int64
    with torch.no_grad():
        y = prepared(x.to(dtype))
    assert y.dtype == dtype
    assert relative(y, exact) < {torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]


def test_a_mixed_form_keeps_its_coefficients_through_sixteen_bit_casts():
    layer = pifa_compile.apply_(compressed(nn.Sequential(nn.Linear(64, 96)).bfloat16(), coefficients="float16"))[0]
    before = layer.coefficients.detach().clone()
    assert (layer.pivot_rows.dtype, layer.coefficients.dtype) == (torch.bfloat16, torch.float16)
    layer.to("cpu").bfloat16()
    assert torch.equal(layer.coefficients, before)
    layer.float()
    assert layer.coefficients.dtype == torch.float32


def test_float16_coefficients_are_closer_to_the_weight_in_a_bfloat16_model():
    model, x = nn.Sequential(nn.Linear(128, 256)).bfloat16(), torch.randn(64, 128)
    errors = {}
    for coefficients in ("same", "float16"):
        run = pifa_compile.compress(model, Svd(density=0.6, coefficients=coefficients), progress=False).run
        errors[coefficients] = run.layers[0].error
        prepared = pifa_compile.apply_(copy.deepcopy(model), run=run.run_id)
        with torch.no_grad():
            eager = prepared(x.bfloat16())
            ours = torch.compile(prepared, backend="pifa")(x.bfloat16())
            transparent = torch.compile(model, backend="pifa", options={"run": run.run_id})(x.bfloat16())
        assert relative(ours, eager.double()) < 1e-2 and relative(transparent, eager.double()) < 1e-2
    assert errors["float16"] < 0.8 * errors["same"]


@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (2, 0, 32), (32,)])
def test_empty_and_single_inputs(shape):
    model = compressed(nn.Sequential(nn.Linear(32, 48)))
    prepared = pifa_compile.apply_(copy.deepcopy(model))
    x = torch.randn(shape)
    with torch.no_grad():
        y = prepared(x)
        assert y.shape == (*shape[:-1], 48)
        for candidate in (model, prepared):
            compiled = torch.compile(candidate, backend="pifa")(x)
            assert compiled.shape == y.shape and torch.allclose(compiled, y, atol=1e-5)


def test_expanded_and_transposed_inputs():
    model = compressed(nn.Sequential(nn.Linear(32, 48)))
    prepared = pifa_compile.apply_(copy.deepcopy(model))
    for x in (torch.randn(1, 32).expand(5, 32), torch.randn(32, 5).T, torch.randn(5, 64)[:, ::2]):
        with torch.no_grad():
            expected = prepared(x.contiguous())
            for f in (prepared, torch.compile(model, backend="pifa"), torch.compile(prepared, backend="pifa")):
                assert torch.allclose(f(x), expected, atol=1e-5)


def test_gradients_flow_through_a_prepared_layer_and_into_trainable_factors():
    model = compressed(nn.Sequential(nn.Linear(32, 48)))
    layer = pifa_compile.apply_(copy.deepcopy(model), trainable=True)
    exact = pifa_compile.restore_(copy.deepcopy(layer))
    x, y = (torch.randn(4, 32).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    torch.compile(layer, backend="pifa")(x).square().sum().backward()
    exact(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-4)
    assert layer[0].pivot_rows.grad is not None and layer[0].coefficients.grad is not None
    assert torch.allclose(layer[0].bias.grad, exact[0].bias.grad, atol=1e-4)


@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_gradients_of_a_factored_layer_and_gradients_of_those(form):
    """Of the input and of every parameter, in float64; a scale is undone exactly."""
    model = compressed(nn.Sequential(nn.Linear(7, 9)).double(), form=form)
    layer = pifa_compile.apply_(model, trainable=True)[0]
    if form == "pifa":
        layer.y_exponent = -2
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def apply(x, *given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert len(parameters) == 3
    assert torch.autograd.gradcheck(apply, (x, *parameters))
    assert torch.autograd.gradgradcheck(apply, (x, *parameters))


@pytest.mark.parametrize("backend", ["pifa", "inductor"])
def test_a_compiled_model_trains_as_an_eager_one(backend):
    """The same losses, gradients and parameters over three steps."""
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24, bias=False))
    eager = pifa_compile.apply_(compressed(model), trainable=True)
    found, x = copy.deepcopy(eager), torch.randn(3, 8, 32)
    compiled = torch.compile(found, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, found)]
    for _ in range(3):
        losses = [model(x).sub(1).square().mean() for model in (eager, compiled)]
        assert torch.allclose(*losses, rtol=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for (name, p), q in zip(eager.named_parameters(), found.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name
        for optimizer in optimizers:
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1, "a step compiles nothing again"


def test_under_autocast_a_prepared_layer_gives_what_a_linear_layer_gives():
    model, x = compressed(nn.Sequential(nn.Linear(32, 48))), torch.randn(5, 32)
    prepared = pifa_compile.apply_(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert prepared(x).dtype == torch.bfloat16
        assert torch.compile(prepared, backend="pifa")(x).dtype == torch.bfloat16
        assert torch.compile(model, backend="pifa")(x).dtype == torch.bfloat16


def test_under_autocast_layers_that_share_factors_give_what_linear_layers_give(relative):
    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(32, 48), nn.Linear(32, 24, bias=False)

        def forward(self, x):
            return self.q_proj(x), self.k_proj(x)

    model, x = Siblings(), torch.randn(5, 32)
    pifa_compile.compress(model, Joint(density=0.6, rank_multiple=4, joint=("q+k",)), progress=False)
    prepared = pifa_compile.apply_(model)
    assert [layer.rows for layer in (prepared.q_proj, prepared.k_proj)] == [48, 24]
    with torch.no_grad():
        wanted = prepared(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for run in (prepared, torch.compile(prepared, backend="pifa", options={"inner": "eager"})):
                for y, exact in zip(run(x), wanted, strict=True):
                    assert y.dtype == torch.bfloat16 and relative(y, exact) < 2e-2


def test_restore_gives_the_layers_back_with_the_weights_of_the_factors():
    model, x = compressed(Mixed()), torch.randn(3, 8, 32)
    kinds = {name: type(m) for name, m in model.named_modules()}
    prepared = pifa_compile.apply_(model)
    with torch.no_grad():
        expected = prepared(x)
        restored = pifa_compile.restore_(prepared)
        assert {name: type(m) for name, m in restored.named_modules()} == kinds
        assert torch.allclose(restored(x), expected, atol=1e-5)


def test_without_a_fitting_run_nothing_is_changed_and_the_error_says_what_there_is():
    compressed(nn.Sequential(nn.Linear(16, 16)))
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(NoRunError, match=r"svd-0\.6"):
        pifa_compile.apply_(model)
    assert isinstance(model[0], nn.Linear)


@pytest.fixture
def checkpoint(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return model, tmp_path / "model"


def test_load_builds_the_model_without_its_dense_weights(checkpoint):
    model, folder = checkpoint
    pifa_compile.compress(model, Svd(density=0.6), name=str(folder), progress=False)
    loaded = pifa_compile.load(folder)
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        expected = pifa_compile.apply_(copy.deepcopy(model))(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])
    assert sum(isinstance(m, PifaLinear) for m in loaded.modules()) == 14


def test_load_refuses_a_run_of_other_weights_by_the_name_of_the_layer(checkpoint):
    from transformers import LlamaForCausalLM

    model, folder = checkpoint
    other = LlamaForCausalLM(model.config)
    run = pifa_compile.compress(other, Svd(density=0.6), progress=False).run_id
    with pytest.raises(InputError, match=r"self_attn\.\w+_proj.*not the one that was compressed"):
        pifa_compile.load(folder, run=run)


def test_load_says_when_a_checkpoint_or_a_run_is_missing(checkpoint, tmp_path):
    _, folder = checkpoint
    with pytest.raises(NoRunError, match="0 runs were made"):
        pifa_compile.load(folder)
    with pytest.raises(InputError, match="cannot load"):
        empty_model(tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(InputError, match=f"the config of {tmp_path} names no architecture; write architectures"):
        empty_model(tmp_path)


def test_a_model_that_is_one_linear_layer_cannot_be_replaced_in_place():
    model = compressed(nn.Linear(32, 48))
    before = model.weight.detach().clone()
    with pytest.raises(InputError, match=r"the model itself is a linear layer; put it into a module"):
        pifa_compile.apply_(model)
    assert type(model) is nn.Linear and torch.equal(model.weight, before)


MEMORY = """
import json, sys, threading, time
import torch
import pifa_compile, pifa_compile.prepare, transformers
from transformers import LlamaConfig, LlamaForCausalLM

def rss():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

folder = sys.argv[1]
pifa_compile.prepare.empty_model(folder)  # imports what loading imports
base = rss()
peak, stop = [base], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], rss())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = pifa_compile.load(folder)
stop.set()
thread.join()
own = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
print(json.dumps({"peak": peak[0] - base, "own": own}))
"""


def test_the_peak_memory_of_load_is_that_of_factors_and_rest(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=256
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                m, n = module.weight.shape
                module.weight.copy_(torch.randn(m, 96) @ torch.randn(96, n))
    model.save_pretrained(tmp_path / "model", max_shard_size="40MB")
    weights = {"*": {"rank": 96}}
    pifa_compile.compress(model, Svd(density=0.2, overrides=weights), name=str(tmp_path / "model"), progress=False)
    dense = sum(p.nbytes for p in model.parameters())
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "model")], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    largest = 1024 * 1024 * 4
    assert found["own"] < 0.25 * dense
    assert found["peak"] < 1.15 * found["own"] + 3 * largest  # one dense weight at a time is read to be checked


def test_one_module_under_several_names_is_replaced_under_all():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.blocks = nn.ModuleList([self.first, nn.Sequential(nn.ReLU(), self.first)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x)) + self.first(x)

    model, x = compressed(Twice()), torch.randn(3, 32)
    exact, gone = oracle(model, x), weakref.ref(model.first.weight)
    pifa_compile.apply_(model)
    gc.collect()
    assert gone() is None
    assert isinstance(model.first, PifaLinear)
    assert model.blocks[0] is model.blocks[1][1] is model.first
    with torch.no_grad():
        assert relative(model(x), exact) < 1e-5
    pifa_compile.restore_(model)
    assert isinstance(model.first, nn.Linear) and model.blocks[0] is model.blocks[1][1] is model.first
    with torch.no_grad():
        assert relative(model(x), exact) < 1e-5
