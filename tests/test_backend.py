"""The backend from end to end: compress, torch.compile(model, backend="pifa"), compare."""

from __future__ import annotations

import copy
import gc
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Store, Svd
from pifa_compile.errors import AmbiguousRunError, OptionError, RecordError
from pifa_compile.loading import load_model, minilm_folder
from pifa_compile.store.objects import object_path


class Mlp(nn.Module):
    def __init__(self, width: int = 64, hidden: int = 160, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def truncate_(model: nn.Module, share: float = 0.25) -> nn.Module:
    """Make every linear weight exactly low-rank: a fp32 product of factors of ``share`` of its smaller side."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                m, n = module.weight.shape
                r = max(1, int(min(m, n) * share))
                product = torch.randn(m, r, dtype=torch.float64) @ torch.randn(r, n, dtype=torch.float64)
                module.weight.copy_(product / (r * n) ** 0.5)
    return model.eval()


def quantize_(model: nn.Module, rank: int) -> nn.Module:
    """Low-rank weights that 16 bits hold exactly: products of factors in {-1, 0, 1} times a power of two."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                m, n = module.weight.shape
                left, right = torch.randint(-1, 2, (m, rank)), torch.randint(-1, 2, (rank, n))
                module.weight.copy_((left @ right).double() * 2.0**-6)
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / b.detach().double().norm())


def counts() -> dict[str, int]:
    return {key: counters["pifa"][key] for key in ("matched", "replaced", "skipped")}


@pytest.fixture
def root(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv("PIFA_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def low_rank_mlp(root):
    model = truncate_(Mlp())
    pifa_compile.compress(model, Svd(density=0.9), progress=False)
    return model


# --- the same outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_an_exactly_low_rank_mlp_gives_the_dense_outputs_at_any_batch(root, bias, guard):
    model = truncate_(Mlp(bias=bias))
    report = pifa_compile.compress(model, Svd(density=0.9), progress=False)
    assert [record.rank for record in report.run.layers] == [16, 16]  # the true ranks, not those that 0.9 would allow
    oracle = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="pifa", fullgraph=True)
    for shape in [(1, 64), (5, 64), (17, 64), (2, 3, 64)]:
        x = torch.randn(shape)
        with guard():
            y = compiled(x)
        assert relative(y, oracle(x.double())) < 1e-5
    assert counters["pifa"]["replaced"] == counters["pifa"]["matched"] > 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.5e-2), (torch.float16, 4e-3)])
def test_sixteen_bit_models_stay_within_the_bounds_of_their_format(root, dtype, bound):
    model = quantize_(Mlp().to(dtype), rank=8)
    report = pifa_compile.compress(model, Svd(density=0.9, rank_multiple=1), progress=False)
    assert [record.rank for record in report.run.layers] == [8, 8]
    x = torch.randn(33, 64, dtype=dtype)
    with torch.no_grad():
        y = torch.compile(model, backend="pifa")(x)
        dense = model(x)
        exact = model.double()(x.double())
    assert y.dtype == dtype
    assert relative(y, exact) < relative(dense, exact) + 2 * bound
    assert counts() == {"matched": 2, "replaced": 2, "skipped": 0}


def test_a_model_cast_after_compression_still_finds_its_factors(low_rank_mlp):
    model = low_rank_mlp.to(torch.bfloat16)
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        y = torch.compile(model, backend="pifa")(x)
        exact = model.double()(x.double())
    assert counts()["replaced"] == 2
    assert relative(y, exact) < 5e-2


def test_minilm_with_its_pooler(root):
    model, tokenizer = load_model(minilm_folder())
    truncate_(model, 0.2)
    pifa_compile.compress(model, Svd(density=0.9), progress=False)
    oracle = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="pifa", dynamic=True)
    sentences = ["A short one.", "Another sentence that is a little longer than the first one was.", "Third."]
    for size in (2, 3, 1):
        inputs = tokenizer(sentences[:size], return_tensors="pt", padding=True)
        with torch.no_grad():
            ours, exact = compiled(**inputs), oracle(**inputs)
        assert relative(ours.last_hidden_state, exact.last_hidden_state) < 1e-5
        assert relative(ours.pooler_output, exact.pooler_output) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2  # torch makes one of its own for a batch of one
    # Dynamo may hand a graph to its backend a second time (it restarts to make a scalar a tensor).
    assert counts() in [{"matched": 37 * k, "replaced": 37 * k, "skipped": 0} for k in (2, 3)]


def test_a_llama_with_grouped_queries_and_a_tied_head(root):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    head = model.lm_head.weight.detach().clone()
    truncate_(model)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    report = pifa_compile.compress(model, Svd(density=0.9), progress=False)
    assert report.summary()["replaced"] == 14
    ids = torch.randint(0, 128, (2, 11))
    with torch.inference_mode():
        ours = torch.compile(model, backend="pifa", fullgraph=True)(ids, use_cache=False).logits
    with torch.no_grad():
        exact = model.double()(ids, use_cache=False).logits
    assert relative(ours, exact) < 1e-5
    assert counts() == {"matched": 15, "replaced": 14, "skipped": 1}


def test_one_weight_at_two_call_sites_has_one_set_of_factors(root):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    model = truncate_(Twice())
    pifa_compile.compress(model, Svd(density=0.9), progress=False)
    seen = []
    x = torch.randn(3, 48)
    with torch.no_grad():
        y = torch.compile(model, backend=recording(seen))(x)
        assert relative(y, model(x)) < 1e-5
    assert counts()["replaced"] == 2
    assert len([name for name, _ in seen[0].named_buffers() if "pivot_rows" in name]) == 1


def recording(seen: list, **options):
    """The backend without Inductor, keeping the graph that it leaves."""

    def backend(gm, inputs):
        compiled = pifa_compile.pifa(gm, inputs, options={"inner": "eager", **options})
        seen.append(gm)
        return compiled

    return backend


# --- what is replaced, and from which run ----------------------------------------------------------------------------


def test_dense_weights_leave_the_graph_and_the_model_keeps_them(low_rank_mlp):
    seen = []
    with torch.no_grad():
        torch.compile(low_rank_mlp, backend=recording(seen))(torch.randn(2, 64))
    shapes = [tuple(n.meta["example_value"].shape) for n in seen[0].graph.find_nodes(op="placeholder")]
    assert (160, 64) not in shapes and (64, 160) not in shapes
    assert tuple(low_rank_mlp.up.weight.shape) == (160, 64)


def test_a_tied_embedding_keeps_its_rows_in_the_graph(root):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(96, 32)
            self.mix = nn.Linear(32, 32)
            self.out = nn.Linear(32, 96, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.mix(self.embed(ids)))

    model = Tied().eval()
    ids = torch.randint(0, 96, (2, 5))
    with torch.no_grad():
        torch.compile(model, backend="pifa", options={"density": 0.5})(ids)
    assert counts() == {"matched": 2, "replaced": 1, "skipped": 1}


def test_the_first_call_compresses_and_a_second_compilation_factors_nothing(root, capsys):
    model, x = Mlp().eval(), torch.randn(4, 64)
    with torch.no_grad():
        first = torch.compile(model, backend="pifa", options={"density": 0.6})(x)
    assert counters["pifa"]["factored"] == 2
    assert "2/2" in capsys.readouterr().err  # progress was shown
    (run,) = Store().runs()
    assert run.complete and run.density <= 0.6
    torch._dynamo.reset()
    with torch.no_grad():
        second = torch.compile(model, backend="pifa", options={"density": 0.6})(x)
    assert counters["pifa"]["factored"] == 2
    assert torch.equal(first, second)


def test_a_density_that_no_run_has_is_never_served_by_another(root):
    model, x = Mlp().eval(), torch.randn(4, 64)
    pifa_compile.compress(model, Svd(density=0.8), progress=False)
    with torch.no_grad():
        torch.compile(model, backend="pifa", options={"density": 0.4})(x)
    assert sorted(run.header.recipe["density"] for run in Store().runs()) == [0.4, 0.8]


def test_several_fitting_runs_are_an_error_that_lists_them(root):
    model = Mlp().eval()
    ids = [pifa_compile.compress(model, Svd(density=d), progress=False).run_id for d in (0.5, 0.7)]
    with torch.no_grad(), pytest.raises(Exception) as caught:
        torch.compile(model, backend="pifa")(torch.randn(2, 64))
    error = caught.value
    while not isinstance(error, AmbiguousRunError) and error.__cause__ is not None:
        error = error.__cause__
    assert all(run_id in str(caught.value) for run_id in ids)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="pifa", options={"run": ids[0]})(torch.randn(2, 64))
    assert counts()["replaced"] == 2


def test_without_factors_everything_stays_dense_and_one_warning_says_so(root):
    model, x = Mlp().eval(), torch.randn(2, 64)
    with torch.no_grad(), pytest.warns(UserWarning, match="2 of 2 linear layers stay dense.*compress"):
        y = torch.compile(model, backend="pifa")(x)
    assert torch.allclose(y, model(x), atol=1e-6)
    assert counts() == {"matched": 2, "replaced": 0, "skipped": 2}
    assert not root.exists()  # looking for factors writes nothing


def test_layers_left_dense_by_the_recipe_stay_dense(root):
    model, x = Mlp().eval(), torch.randn(2, 64)
    pifa_compile.compress(model, Svd(density=0.6, skip=("down",)), progress=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(model, backend="pifa")(x)
    assert counts() == {"matched": 2, "replaced": 1, "skipped": 1}


def test_skip_at_compile_time(low_rank_mlp):
    with torch.no_grad():
        torch.compile(low_rank_mlp, backend="pifa", options={"skip": ["*up"]})(torch.randn(2, 64))
    assert counts() == {"matched": 2, "replaced": 1, "skipped": 1}


# --- gradients -------------------------------------------------------------------------------------------------------


def test_trainable_weights_are_not_replaced_while_gradients_are_on(low_rank_mlp):
    x = torch.randn(2, 64)
    with pytest.warns(UserWarning, match="no_grad"):
        y = torch.compile(low_rank_mlp, backend="pifa")(x)
    y.sum().backward()
    assert counts() == {"matched": 2, "replaced": 0, "skipped": 2}
    assert low_rank_mlp.up.weight.grad is not None


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights_or_the_caller_s_word_allow_it_and_inputs_get_gradients(low_rank_mlp, frozen):
    x = torch.randn(3, 64, requires_grad=True)
    exact = torch.autograd.grad(low_rank_mlp(x).square().sum(), x)[0]
    low_rank_mlp.requires_grad_(not frozen)
    options = {} if frozen else {"allow_grad": True}
    y = torch.compile(low_rank_mlp, backend="pifa", options=options)(x)
    assert counts()["replaced"] == 2
    assert relative(torch.autograd.grad(y.square().sum(), x)[0], exact) < 1e-4


# --- shapes, modes, options ------------------------------------------------------------------------------------------


def test_lengths_and_batches_cost_one_recompilation_at_most(low_rank_mlp):
    compiled = torch.compile(low_rank_mlp, backend="pifa", options={"inner": "eager"})
    with torch.no_grad():
        for batch, length in [(1, 7), (2, 9), (3, 30), (8, 5), (5, 512)]:
            compiled(torch.randn(batch, length, 64))
    assert counters["stats"]["unique_graphs"] <= 3  # static, then one dimension dynamic, then both
    counters.clear()
    torch._dynamo.reset()
    compiled = torch.compile(low_rank_mlp, backend="pifa", dynamic=True, options={"inner": "eager"})
    with torch.no_grad():
        for batch, length in [(2, 9), (3, 30), (8, 5), (5, 512)]:
            compiled(torch.randn(batch, length, 64))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_torch_compile(low_rank_mlp, mode):
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = torch.compile(low_rank_mlp, backend="pifa", mode=mode)(x)
        assert relative(y, low_rank_mlp(x)) < 1e-5
    assert counts()["replaced"] == 2


def test_inductor_options_reach_inductor(low_rank_mlp):
    from torch._inductor import config

    seen = []

    def note(graph):
        seen.append((config.epilogue_fusion, config.cpp.threads))

    options = {"epilogue_fusion": False, "cpp.threads": 1, "post_grad_custom_pre_pass": note}
    with torch.no_grad():
        torch.compile(low_rank_mlp, backend="pifa", options=options)(torch.randn(3, 64))
    assert seen == [(False, 1)]


def test_an_unknown_option_is_refused_with_the_nearest_name(low_rank_mlp):
    with torch.no_grad(), pytest.raises(Exception, match=r"densty.*did you mean 'density'"):
        torch.compile(low_rank_mlp, backend="pifa", options={"densty": 0.5})(torch.randn(3, 64))


def test_a_bad_option_called_directly_is_an_option_error():
    with pytest.raises(OptionError, match="density"):
        pifa_compile.pifa(torch.fx.symbolic_trace(nn.Identity()), [], options={"density": 1.5})


def test_the_log_tells_what_the_dense_weights_take(low_rank_mlp, caplog):
    with torch.no_grad(), caplog.at_level("INFO", "pifa_compile"):
        torch.compile(low_rank_mlp, backend="pifa", options={"inner": "eager"})(torch.randn(3, 64))
    megabytes = 2 * 4 * 64 * 160 / 1e6
    assert "2 of 2 linear layers replaced from run svd-0.9" in caplog.text
    assert f"dense weights stay in memory beside the factors: {megabytes:.1f} MB" in caplog.text


def test_weights_that_dynamo_hides_are_told_of(low_rank_mlp):
    """Under a global ``freezing`` they come as constants of the graph: a warning, not a silent dense model."""
    from torch._inductor import config

    x = torch.randn(3, 64)
    with torch.no_grad(), config.patch(freezing=True):
        with pytest.warns(UserWarning, match=r"2 weights are constants.*freezing.*options=\{'freezing': True\}"):
            y = torch.compile(low_rank_mlp, backend="pifa")(x)
        with pytest.warns(UserWarning, match="2 weights are constants"):
            pifa_compile.dry_run(low_rank_mlp, x)
    assert counts()["replaced"] == 0
    assert relative(y, low_rank_mlp(x)) < 1e-5


def test_freezing_as_an_option_replaces_all_and_warns_of_nothing(low_rank_mlp):
    x = torch.randn(3, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        y = torch.compile(low_rank_mlp, backend="pifa", options={"freezing": True})(x)
    assert counts()["replaced"] == 2
    assert relative(y, low_rank_mlp(x)) < 1e-5


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_factors_that_a_first_call_made_and_a_disk_lost_are_told_of_and_made_again(root, damage):
    model, x = Mlp().eval(), torch.randn(32, 64)

    def call():
        torch.compiler.reset()
        gc.collect()  # what is in memory is not read again
        with torch.no_grad():
            return torch.compile(model, backend="pifa", options={"density": 0.6, "inner": "eager"})(x)

    first = call()
    (run,) = Store().runs()
    path = object_path(Store().root, run.layers[1].object)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(Exception, match=r"down: .*safetensors.*Store\.delete_run, and call again"):
        call()
    Store().delete_run(run.run_id)
    assert torch.equal(call(), first)
    assert Store().verify(run.run_id) == []


def test_a_run_that_tells_a_wrong_shape_is_refused_by_the_name_of_the_layer(low_rank_mlp, root):
    store = Store()
    (run,) = store.runs()
    up, down = run.layers
    lying = [replace(up, digests=down.digests), replace(down, digests=up.digests)]
    store.delete_run(run.run_id)
    with store.write_run(run.header) as writer:
        for record in lying:
            writer.add(record)
        writer.finish()
    with torch.no_grad(), pytest.raises(Exception, match=r"layer 'down'.*says 64 x 160, the weight is 160 x 64"):
        torch.compile(low_rank_mlp, backend="pifa", options={"inner": "eager"})(torch.randn(2, 64))
    with pytest.raises(RecordError, match=r"says 64 x 160, the weight is 160 x 64.*delete_run"):
        pifa_compile.apply_(low_rank_mlp)
    assert isinstance(low_rank_mlp.up, nn.Linear)
