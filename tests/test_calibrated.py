"""Calibrated compression of small random models: what is stored, the same again, and what calibration may do wrong."""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pifa_compile.cli import main
from pifa_compile.compression import calibration, compress, compress_weights
from pifa_compile.compression.calibration import SelfText, calibrate_on, sample_windows
from pifa_compile.errors import InputError, RecipeError, WeightError
from pifa_compile.layers import linear_weights
from pifa_compile.prepare import apply_
from pifa_compile.recipes import RECIPES, Mpifa, Svd, SvdLlm, recipe_from_json
from pifa_compile.store import Store

SETTINGS = {"density": 0.5, "rank_multiple": 1, "windows": 12, "window_length": 16}


def language_model(dtype=torch.float32, seed=0, **settings):
    """A random Llama whose weights have falling spectra."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape | {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0} | settings)
    model = LlamaForCausalLM(config).eval()
    for weight in linear_weights(model):
        u, s, vh = torch.linalg.svd(weight.parameter.detach(), full_matrices=False)
        weight.parameter.data = u * (s * torch.logspace(0.5, -1, len(s))) @ vh
    return model.to(dtype)


def encoder(seed=0):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(**shape, vocab_size=64, max_position_embeddings=64)).eval()


def windows(count=12, length=16, seed=5):
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def run_of(model, recipe=None, text=None, store=None):
    recipe = recipe or Mpifa(**SETTINGS)
    return compress(model, recipe, text=windows() if text is None else text, store=store, progress=False).run


def facts(run):
    return [replace(r, seconds=0.0) for r in run.layers]


def replaced(run):
    return [r for r in run.layers if r.object is not None]


# --- what is stored ---------------------------------------------------------------------------------------------------

RECIPES_TRIED = [
    SvdLlm(**SETTINGS),
    SvdLlm(**SETTINGS, form="pair"),
    SvdLlm(**SETTINGS, allocation="relative"),
    Mpifa(**SETTINGS),
    Mpifa(**SETTINGS, weighting="diagonal", allocation="relative"),
    Mpifa(**SETTINGS, weighting="none", allocation="uniform"),
    Mpifa(**SETTINGS, weighting="none", allocation="uniform", solver="alternating", mixing=0.25),
]


@pytest.mark.parametrize("recipe", RECIPES_TRIED, ids=lambda r: f"{r.method}-{r.allocation}-{r.form}")
def test_every_layer_is_done_within_the_budget_and_its_errors_are_told(store, recipe):
    model = language_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    run = run_of(model, recipe, store=store)
    assert run.complete
    assert run.header.calibration["source"] == "tokens"
    assert set(run.by_name) == {w.name for w in linear_weights(model)}
    eligible = [r for r in run.layers if r.name != "lm_head"]
    assert 0.44 < sum(r.numbers for r in eligible) / sum(r.dense_numbers for r in eligible) <= 0.5
    assert sum(len(r.layers) for r in replaced(run)) >= 10
    for r in replaced(run):
        assert 0 <= r.least_error <= r.truncation * (1 + 1e-6), r.name
        assert r.error < 1e-5
        assert r.details["tokens"] == 11 * 16, "one window in sixteen, one at least, is held out"
    assert run.by_name["model.layers.0.self_attn.q_proj"].details["input_rank"] == 32
    assert store.verify(run.run_id) == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "the model is left as it is"


def test_the_error_is_that_of_the_outputs_on_held_out_text(store):
    """By hand for the first group: its inputs are the same in both flows."""
    model = language_model()
    run = run_of(model, SvdLlm(**SETTINGS), store=store)
    calibration = calibrate_on(model, windows(), windows=12, length=16)
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].reshape(-1, 32).double()))
    with torch.no_grad():
        for batch in calibration.held_out:
            model(**batch)
    handle.remove()
    x = torch.cat(seen)
    record = run.by_name["model.layers.0.self_attn.q_proj"]
    wanted = x @ layer.weight.detach().double().T
    made = x @ store.factors(record).weight().T
    assert record.truncation == pytest.approx(float((made - wanted).norm() / wanted.norm()), rel=1e-6)
    s = torch.linalg.svdvals(wanted)
    assert record.least_error == pytest.approx(float(s[record.rank :].norm() / s.norm()), abs=1e-6)


@torch.no_grad()
def divergence(model, run, store, ids):
    """Kullback-Leibler divergence of the dense model's next tokens from those with the run's factors."""
    compressed = apply_(copy.deepcopy(model), run=run.run_id, store=store)
    wanted, found = (torch.log_softmax(m(input_ids=ids).logits.double(), -1) for m in (model, compressed))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_the_default_loses_less_than_svd_llm_and_that_less_than_svd(store):
    model = language_model()
    text, other = sample_windows(model, 64, 32, seed=1), sample_windows(model, 64, 32, seed=2)
    settings = SETTINGS | {"windows": 64, "window_length": 32}
    svd = compress(model, Svd(density=0.5, rank_multiple=1, form="pair"), store=store, progress=False).run
    whitened = run_of(model, SvdLlm(**settings, form="pair"), text, store)
    default = run_of(model, Mpifa(**settings), text, store)
    lost = [divergence(model, run, store, other) for run in (default, whitened, svd)]
    assert lost[0] < 0.5 * lost[1] < 0.5 * lost[2], lost


def test_overrides_and_skips_have_no_part_in_the_budget(store):
    name = "model.layers.0.mlp.up_proj"
    recipe = Mpifa(**SETTINGS, overrides={name: {"rank": 3}}, skip=["*q_proj"])
    run = run_of(language_model(), recipe, store=store)
    assert run.by_name[name].rank == 3
    assert run.by_name["model.layers.1.self_attn.q_proj"].reason == "skipped by the pattern '*q_proj'"
    free = [r for r in run.layers if r.name not in (name, "lm_head") and "q_proj" not in r.name]
    assert 0.44 < sum(r.numbers for r in free) / sum(r.dense_numbers for r in free) <= 0.5


def test_equal_weights_are_one_layer(store):
    model = language_model()
    first, second = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    second.load_state_dict(first.state_dict())
    run = run_of(model, store=store)
    assert "model.layers.1.mlp.up_proj" not in run.by_name
    assert run.header.layers_planned == len(run.layers) == 14


# --- the same again ---------------------------------------------------------------------------------------------------


def test_the_same_seed_and_text_give_the_same_digests(tmp_path):
    runs = [run_of(language_model(), store=Store(tmp_path / str(i))) for i in range(2)]
    assert facts(runs[0]) == facts(runs[1])
    assert runs[0].run_id == runs[1].run_id


def test_a_second_call_computes_nothing(store):
    run = run_of(language_model(), store=store)
    made = counters["pifa"]["factored"]
    assert run_of(language_model(), store=store) == run
    assert counters["pifa"]["factored"] == made > 0


def test_another_text_is_another_run(store):
    model = language_model()
    assert run_of(model, text=windows(seed=6), store=store).run_id != run_of(model, store=store).run_id


def walk_until_killed(root, count):
    """In another process: compress until the ``count``-th factors are in the store, but not yet in the run."""
    put, calls = Store.put_factors, []

    def put_and_die(self, factors):
        digest = put(self, factors)
        calls.append(digest)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return digest

    Store.put_factors = put_and_die
    run_of(language_model(), store=root)


def test_a_walk_that_was_killed_goes_on_and_gives_the_same_run(store, tmp_path):
    whole = run_of(language_model(), store=tmp_path / "other")
    code = f"import runpy; runpy.run_path({__file__!r})['walk_until_killed']({str(store.root)!r}, 9)"
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (begun,) = store.runs()
    assert not begun.complete
    counters.clear()
    run = run_of(language_model(), store=store)
    assert counters["pifa"]["factored"] == len(replaced(whole)) - 8, "what was finished is not done again"
    assert facts(run) == facts(whole)


# --- robustness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes(store, dtype):
    run = run_of(language_model(dtype), store=store)
    assert sum(len(r.layers) for r in replaced(run)) >= 10
    assert {store.factors(r).dtype for r in replaced(run)} == {dtype}
    assert all(r.truncation < 1 for r in replaced(run))


def test_fewer_tokens_than_inputs(store):
    """One window of 8 tokens for layers with 32 and 48 inputs; nothing can be held out."""
    run = run_of(language_model(), Mpifa(**SETTINGS | {"windows": 1}), windows(1, 8), store)
    assert run.header.calibration["held_out"] == 0
    assert all(r.details["input_rank"] <= 8 for r in replaced(run))
    assert all(torch.isfinite(store.factors(r).weight()).all() for r in replaced(run))


def test_dead_inputs_and_outlier_channels(store):
    model = language_model()
    norm = model.model.layers[0].input_layernorm.weight
    norm.data[3], norm.data[7] = 0.0, 1e4
    run = run_of(model, store=store)
    record = run.by_name["model.layers.0.self_attn.k_proj"]
    assert record.details["input_rank"] == 31
    assert all(torch.isfinite(store.factors(r).weight()).all() for r in replaced(run))
    assert all(r.least_error <= r.truncation * (1 + 1e-6) + 1e-9 for r in replaced(run))


def test_a_weight_of_zeros_stays_dense(store):
    model = language_model()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    for recipe in (Mpifa(**SETTINGS), SvdLlm(**SETTINGS)):
        assert run_of(model, recipe, store=store).by_name["model.layers.0.mlp.up_proj"].reason


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(store):
    model = language_model()
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(WeightError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs"):
        run_of(model, SvdLlm(**SETTINGS), store=store)


def test_an_encoder_with_padding_and_a_pooler_outside_of_its_blocks(store):
    model = encoder()
    batches = [
        {"input_ids": windows(4, 12, seed=i), "attention_mask": torch.ones(4, 12, dtype=torch.int64)} for i in range(5)
    ]
    for batch in batches:
        batch["attention_mask"][:, 9:] = 0
    run = run_of(model, Mpifa(**SETTINGS), batches, store)
    assert run.by_name["encoder.layer.0.attention.self.query"].details["tokens"] == 4 * 4 * 9
    assert run.by_name["pooler.dense"].form in ("pifa", "dense")
    for batch in batches:
        batch["input_ids"][:, 9:] = 1
    assert [r.rank for r in run_of(model, Mpifa(**SETTINGS), batches, store).layers] == [r.rank for r in run.layers]


def test_a_model_without_blocks(store):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
    model.forward = lambda x: nn.Sequential.forward(model, x)
    run = run_of(model, Mpifa(**SETTINGS), [{"x": torch.randn(64, 24)} for _ in range(4)], store)
    assert all(r.object or "allocation" in r.reason for r in run.layers)


# --- texts ------------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer that knows letters only."""

    def __call__(self, text, **settings):
        if isinstance(text, str):
            return {"input_ids": torch.tensor([[ord(c) % 64 for c in text]])}
        length = min(max(map(len, text)), settings["max_length"])
        ids = torch.zeros(len(text), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, line in enumerate(text):
            cut = [ord(c) % 64 for c in line[:length]]
            ids[row, : len(cut)], mask[row, : len(cut)] = torch.tensor(cut), 1
        return {"input_ids": ids, "attention_mask": mask}


def test_a_text_may_be_given_in_any_way(tmp_path):
    model, text = language_model(), "a few words of text and some more. " * 40
    file = tmp_path / "text.txt"
    file.write_text(text)
    found = [calibrate_on(model, given, Words(), windows=8, length=16) for given in (file, text, [text])]
    assert found[0].identity == found[1].identity == found[2].identity
    assert [sum(len(b["input_ids"]) for b in part) for part in (found[0].batches, found[0].held_out)] == [7, 1]
    sentences = calibrate_on(encoder(), text.replace(". ", ".\n"), Words(), windows=20, length=16)
    assert sentences.identity["source"] == "sentences"
    assert set(sentences.batches[0]) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        (torch.zeros(0, 16, dtype=torch.int64), "not one batch"),
        ("too short", "less than one window"),
        (["x"], "needs a tokenizer"),
    ],
)
def test_texts_that_cannot_be_used(text, message):
    tokenizer = None if "tokenizer" in message else Words()
    with pytest.raises(InputError, match=message):
        calibrate_on(language_model(), text, tokenizer, length=64)


def test_a_causal_model_samples_its_own_text(store):
    model = language_model()
    first, second = (sample_windows(model, 5, 12, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (5, 12)
    assert not torch.equal(first, sample_windows(model, 5, 12, seed=4))
    run = compress(model, Mpifa(**SETTINGS), store=store, progress=False).run
    assert run.header.calibration["source"] == "self"
    with pytest.raises(InputError, match="cannot sample its own"):
        compress(encoder(), Mpifa(**SETTINGS), store=store, progress=False)


def test_a_finished_run_on_its_own_text_is_found_without_sampling(store, monkeypatch):
    run = compress(language_model(), Mpifa(**SETTINGS), store=store, progress=False).run
    monkeypatch.setattr(calibration, "sample_windows", None)
    assert compress(language_model(), Mpifa(**SETTINGS), store=store, progress=False).run == run
    other = language_model()
    other.model.norm.weight.data[0] *= 2
    known = [SelfText(model, 12, 16, seed).identity for model in (language_model(), other) for seed in (0, 1)]
    assert run.header.calibration == known[0]
    assert all(known.count(identity) == 1 for identity in known), "any weight, any seed: another text"


def test_samples_have_the_frequencies_of_the_model():
    model = language_model()
    first = sample_windows(model, 4000, 1, seed=0).flatten()
    with torch.no_grad():
        wanted = torch.softmax(model(input_ids=torch.tensor([[model.config.bos_token_id]])).logits[0, -1], -1)
    assert float((torch.bincount(first, minlength=64) / 4000 - wanted).abs().max()) < 0.03


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES_TRIED, ids=lambda r: f"{r.method}-{r.allocation}-{r.form}")
def test_recipes_go_through_json(recipe):
    assert recipe_from_json(recipe.to_json()) == recipe
    assert RECIPES[recipe.method] is type(recipe)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Mpifa, {"weighting": "ful"}, "did you mean 'full'"),
        (Mpifa, {"solver": "alternating"}, "weighting='none'"),
        (Mpifa, {"mixing": 1.5}, "from 0 to 1"),
        (Mpifa, {"windows": 0}, "whole number"),
        (SvdLlm, {"allocation": "loss"}, "no gradients"),
    ],
)
def test_impossible_fields(kind, settings, message):
    with pytest.raises(RecipeError, match=message):
        kind(density=0.5, **settings)


def test_a_method_without_calibration_takes_no_text(store):
    with pytest.raises(InputError, match="uses no text"):
        run_of(language_model(), Svd(density=0.5), store=store)


def test_weights_alone_are_not_enough_for_a_calibrated_method(store):
    weights = list(linear_weights(language_model()))
    with pytest.raises(RecipeError, match="needs the model and a text"):
        compress_weights(weights, Mpifa(density=0.5), store, model="graph", progress=False)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model and a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    letters = {chr(97 + i): i for i in range(26)} | {"?": 26}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    language_model().save_pretrained(path)
    return path


def test_the_command_compresses_on_a_text(folder, store, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words of a text that is long enough for a few windows " * 30)
    arguments = ["compress", str(folder), "--density", "0.5", "--rank-multiple", "1", "--method", "mpifa"]
    assert main([*arguments, "--text", str(text)]) == 0
    assert "mpifa-0.5-" in capsys.readouterr().out
    (run,) = store.runs()
    assert (run.complete, run.header.calibration["source"]) == (True, "text")
    assert main(["compress", str(folder), "--method", "svd", "--density", "0.5", "--text", str(text)]) == 1
    assert "uses no text" in capsys.readouterr().err
