"""Tuning: losses against their definitions, what trains, what is kept, what is refused, and what is written."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import pifa_compile
from pifa_compile import PifaLinear, Svd, Tuning, cli, tune
from pifa_compile.errors import InputError, RecipeError
from pifa_compile.loading import load_model
from pifa_compile.modules import factored_layers
from pifa_compile.tuning import tasks, training
from pifa_compile.tuning.material import MOST_HELD_OUT, read
from pifa_compile.tuning.objectives import divergence, next_token_loss, output_error

TEXT = "def add(first, second):\n    return first + second\n\nclass Thing:\n    name = 'thing'\n" * 12
SMALL = {"steps": 12, "batch": 4, "length": 32, "checks": 3, "lr": 1e-3}


@pytest.fixture
def pair(language_folder):
    """The dense model and a prepared copy of it."""
    dense, _ = load_model(language_folder)
    pifa_compile.compress(dense, Svd(density=0.5, rank_multiple=1), progress=False)
    return dense, pifa_compile.apply_(copy.deepcopy(dense))


def run(model, **settings):
    teacher = settings.pop("teacher", None)
    given = {"text": TEXT, "tokenizer": byte_tokenizer()} | {k: settings.pop(k) for k in ("text",) if k in settings}
    return tune(model, Tuning(**(SMALL | settings)), teacher=teacher, progress=False, **given)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_are_what_they_are_called():
    logits, wanted = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    ids = torch.randint(7, (2, 5))
    token = -torch.stack([logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(4)]).mean()
    assert torch.allclose(next_token_loss(logits, ids), token)
    p, q = (t.div(3).softmax(-1) for t in (wanted, logits))
    assert torch.allclose(divergence(logits, wanted, 3.0), 9 * (p * (p / q).log()).sum(-1).mean())
    assert divergence(wanted, wanted).abs() < 1e-12
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    kept = mask.bool()
    error = (logits - wanted)[kept].square().sum() / wanted[kept].square().sum()
    assert torch.allclose(output_error(logits, wanted, mask), error)
    assert output_error(logits, wanted) != error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_16_bit_outputs_are_taken_in_float32(dtype):
    logits, ids = torch.randn(1, 4, 9).to(dtype), torch.randint(9, (1, 4))
    for loss in (next_token_loss(logits, ids), divergence(logits, 2 * logits), output_error(logits, 2 * logits)):
        assert loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_of_the_losses(temperature):
    logits, wanted = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(1, 3, 4).double()
    assert torch.autograd.gradcheck(lambda t: divergence(t, wanted, temperature), logits)
    assert torch.autograd.gradcheck(lambda t: next_token_loss(t, torch.tensor([[0, 3, 1]])), logits)
    assert torch.autograd.gradcheck(lambda t: output_error(t, wanted), logits)


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "mix"), [("lm", 0.0), ("distill", 0.0), ("distill", 0.5)])
def test_the_held_out_loss_falls_and_the_factors_alone_have_changed(pair, loss, mix):
    dense, model = pair
    before, teacher = state(model), state(dense)
    report = run(model, loss=loss, mix=mix, teacher=dense if loss == "distill" else None)
    assert report.after["loss"] < report.before["loss"] == report.course[0][1]
    assert [step for step, _ in report.course] == [0, 4, 8, 12]
    assert min((value, step) for step, value in report.course) == (report.after["loss"], report.best)
    factors = {f"{name}.{key}" for name, layer in factored_layers(model) for key, _ in layer.named_parameters()}
    changed = {name for name, t in state(model).items() if not torch.equal(t, before[name])}
    assert changed == factors
    assert report.numbers == sum(p.numel() for _, layer in factored_layers(model) for p in layer.parameters())
    assert all(torch.equal(t, teacher[name]) for name, t in dense.state_dict().items())
    assert not any(p.requires_grad for _, layer in factored_layers(model) for p in layer.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_figures_are_those_of_the_model_that_is_left(pair):
    """Measured again from the outside, on the windows that were held out."""
    dense, model = pair
    report = run(model, teacher=dense)
    held = read(model, TEXT, byte_tokenizer(), Tuning(**SMALL)).judged(4)
    ids = torch.cat([batch["input_ids"] for batch in held])
    tokens = byte_tokenizer()(TEXT)["input_ids"]
    assert ids.flatten().tolist() == tokens[report.items * 32 : (report.items + report.held_out) * 32]
    with torch.no_grad():
        logits, wanted = model(ids).logits, dense(ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report.after["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert report.after["divergence"] == pytest.approx(float(divergence(logits, wanted)), rel=1e-4)


def test_the_same_seed_gives_the_same_factors(pair):
    first, again, other = (copy.deepcopy(pair[1]) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        torch.rand(3)  # what has been drawn before has no say
        run(model, loss="lm", seed=seed)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in first.state_dict().items())
    assert any(not torch.equal(t, other.state_dict()[name]) for name, t in first.state_dict().items())


def test_other_parameters_train_where_they_are_named(pair):
    _, model = pair
    before = state(model)
    run(model, loss="lm", also=("*input_layernorm*",))
    changed = {name for name, t in state(model).items() if not torch.equal(t, before[name])}
    assert "model.layers.0.input_layernorm.weight" in changed and "model.norm.weight" not in changed


@pytest.mark.parametrize("recipe", [Svd(density=0.5, form="pair"), pifa_compile.Joint(density=0.5, rank_multiple=1)])
def test_pairs_and_factors_that_layers_share_train(language_folder, recipe):
    model, _ = load_model(language_folder)
    pifa_compile.compress(model, recipe, progress=False)
    pifa_compile.apply_(model)
    report = run(model, loss="lm")
    assert report.best and report.numbers == sum(
        p.numel() for p in {id(p): p for _, layer in factored_layers(model) for p in layer.parameters()}.values()
    )
    if isinstance(recipe, pifa_compile.Joint):
        attention = model.model.layers[0].self_attn
        assert attention.q_proj.pivot_rows is attention.k_proj.pivot_rows


@pytest.mark.parametrize(
    ("dtype", "coefficients"), [("bfloat16", "same"), ("bfloat16", "float16"), ("float16", "same")]
)
def test_models_of_16_bits_keep_their_dtypes_and_get_better(language_folder, dtype, coefficients):
    model, _ = load_model(language_folder, getattr(torch, dtype))
    pifa_compile.compress(model, Svd(density=0.5, rank_multiple=1, coefficients=coefficients), progress=False)
    pifa_compile.apply_(model)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    assert run(model, loss="lm").best
    assert {name: t.dtype for name, t in model.state_dict().items()} == dtypes


class Sum:
    """Not a model: the loss is the mean of a parameter times a number."""

    def __init__(self, parameter, scale=1.0):
        self.parameter, self.scale = parameter, scale

    def loss(self, batch):
        return (self.parameter * self.scale).float().sum()

    def measure(self, batches):
        return {"loss": float(self.parameter.detach().float().mean())}


class Nothing:
    items, held_out = [0], [0]

    def batches(self, size, seed):
        return iter([{}] * 100)

    def judged(self, size):
        return []


def test_steps_below_the_spacing_of_16_bit_numbers_add_up():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    how = Tuning(loss="lm", steps=40, lr=1e-3, checks=1)  # numbers next to 1 are 2**-8 away
    training.train(Sum(parameter), Nothing(), [parameter], how, "", progress=False)
    assert parameter.detach().max() < 0.99


def test_gradients_too_small_for_float16_are_not_lost():
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float16))
    how = Tuning(loss="lm", steps=20, lr=1e-2)
    assert torch.tensor(1e-8).half() == 0
    training.train(Sum(parameter, 2.0**-24 / 3), Nothing(), [parameter], how, "", progress=False)
    assert parameter.detach().max() < 0.95


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "word"), [(1.0, "no state was better"), (1e30, "use a lower learning rate")])
def test_a_training_that_makes_it_worse_leaves_the_model_as_it_was_and_says_so(pair, caplog, lr, word):
    dense, model = pair
    before = state(model)
    report = run(model, lr=lr, teacher=dense)
    assert report.best == 0 and report.after == report.before
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert word in caplog.text and "as it was" in caplog.text and "the start" in str(report)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report.to_json()


def test_the_best_state_is_kept_not_the_last(pair, monkeypatch):
    """The held-out loss is made to rise after the second of four measurements."""
    _, model = pair
    states, measure = [], tasks._NextTokens.measure

    def rising(self, batches):
        states.append(state(model))
        found = measure(self, batches)
        return found | {"loss": found["loss"] + 10 * (len(states) > 3)}

    monkeypatch.setattr(tasks._NextTokens, "measure", rising)
    report = run(model, loss="lm", checks=4)
    assert (report.best, report.done) == (6, 12)
    assert all(torch.equal(t, states[2][name]) for name, t in model.state_dict().items())


def test_an_interrupt_keeps_the_best_state_so_far(pair, monkeypatch, caplog):
    _, model = pair
    calls, loss = [], tasks._NextTokens.loss

    def interrupted(self, batch):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 7:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(tasks._NextTokens, "loss", interrupted)
    report = run(model, loss="lm")
    assert report.interrupted and (report.done, report.best) == (6, 4)
    assert "interrupted after step 6" in caplog.text
    monkeypatch.undo()
    ids = torch.cat([b["input_ids"] for b in read(model, TEXT, byte_tokenizer(), Tuning(**SMALL)).judged(4)])
    with torch.no_grad():
        logits = model(ids).logits
    assert float(next_token_loss(logits, ids)) == pytest.approx(report.after["loss"], rel=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_gradients_are_off(pair, mode):
    dense, model = pair
    with mode():
        windows = torch.randint(256, (1, 32)).repeat(20, 1)
        assert run(model, teacher=dense, text=windows).best


def test_it_runs_without_dropout_and_leaves_the_modes_as_they_were(pair):
    _, model = pair
    model.train()
    model.model.layers[0].eval()
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    run(model, loss="lm")
    assert seen and not any(seen)
    assert model.training and not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training


def test_a_model_that_is_compiled_in_place_trains_as_an_eager_one(pair):
    _, eager = pair
    model = copy.deepcopy(eager)
    model.compile(backend="pifa", options={"inner": "eager"})
    found, wanted = (run(m, loss="lm", steps=4, checks=2) for m in (model, eager))
    assert counters["pifa"]["prepared"] == 2 * 14, "one graph with gradients, one without"
    assert [loss for _, loss in found.course] == pytest.approx([loss for _, loss in wanted.course], rel=1e-5)
    for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4), name
    with pytest.raises(InputError, match=r"torch.compile has wrapped the model.*model.compile"):
        run(torch.compile(eager, backend="eager"), loss="lm")


# --- other models -----------------------------------------------------------------------------------------------------


def test_an_encoder_is_moved_towards_the_outputs_of_the_dense_one(encoder_folder):
    dense, tokenizer = load_model(encoder_folder)
    pifa_compile.compress(dense, Svd(density=0.5, rank_multiple=1), progress=False)
    model = pifa_compile.apply_(copy.deepcopy(dense))
    lines = [f"line {i} of a text " * (1 + i % 3) for i in range(40)]
    how = Tuning(steps=12, batch=4, length=32, lr=3e-3, checks=3)
    report = tune(model, how, text=lines, tokenizer=tokenizer, teacher=dense, progress=False)
    assert report.after["loss"] < 0.9 * report.before["loss"]
    assert report.after["mean_cosine"] > report.before["mean_cosine"]
    with pytest.raises(InputError, match=r"BertModel does not continue text.*distill"):
        tune(model, Tuning(loss="lm"), text=lines, tokenizer=tokenizer)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "kl"}, {"steps": 0}, {"steps": 2.5}, {"batch": -1}, {"length": 1}, {"lr": 0}, {"lr": math.nan},
        {"seed": 1.5}, {"mix": 2}, {"temperature": 0}, {"clip": -1}, {"checks": 0}, {"also": "*norm*"},
        {"loss": "lm", "mix": 0.5}, {"loss": "lm", "temperature": 2},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(RecipeError, match=list(settings)[-1]):
        Tuning(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " \n"}, "the text is empty"),
        ({"text": "a few words"}, "less than one window of 32"),
        ({"text": "a few words, but more" * 2}, "one window of 32 tokens, and one to judge by"),
        ({"text": [1, 2]}, "cannot tune on a list.*Trainer"),
        ({"text": torch.zeros(4, 8)}, r"token windows.*not \(4, 8\) of torch.float32"),
        ({"length": 1000}, "a window cannot have 1000 tokens; give 2 to 256"),
        ({"also": ("*nothing*",)}, r"no parameter has a name like '\*nothing\*'"),
        ({"loss": "distill"}, "needs the dense model"),
    ],
)
def test_what_cannot_be_tuned_on_is_refused(pair, change, message):
    with pytest.raises(InputError, match=message):
        run(pair[1], **({"loss": "lm"} | change))


def test_models_that_cannot_be_tuned_are_refused(pair, language_folder):
    dense, model = pair
    with pytest.raises(InputError, match=r"no factored layers.*apply_"):
        run(dense, loss="lm")
    with pytest.raises(InputError, match="needs a tokenizer"):
        tune(model, Tuning(loss="lm"), text=TEXT)
    with pytest.raises(InputError, match="no use for a teacher"):
        run(model, loss="lm", teacher=dense)
    with pytest.raises(InputError, match=r"q_proj.pivot_rows is the teacher's own too"):
        run(model, teacher=model)
    with torch.inference_mode():
        untrainable = pifa_compile.apply_(load_model(language_folder)[0])
    with pytest.raises(InputError, match=r"q_proj.pivot_rows was made under torch.inference_mode"):
        run(untrainable, loss="lm")
    empty = copy.deepcopy(model).to("meta")
    with pytest.raises(InputError, match=r"q_proj.pivot_rows is torch.float32 on meta and cannot be trained; load"):
        run(empty, loss="lm")
    other = copy.deepcopy(dense)
    other.resize_token_embeddings(300)
    with pytest.raises(InputError, match=r"teacher's outputs are \(\d, 32, 300\), the model's \(\d, 32, 256\)"):
        run(model, teacher=other)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match="before the first step"):
        run(model, loss="lm")


# --- texts ------------------------------------------------------------------------------------------------------------


def test_the_end_of_the_text_is_held_out_and_the_rest_is_drawn_without_repeats(pair):
    windows = torch.arange(70).unsqueeze(1).repeat(1, 4)
    material = read(pair[1], windows, None, Tuning())
    assert len(material.held_out) == 4 and [int(t[0]) for t in material.held_out] == [66, 67, 68, 69]
    batches = material.batches(11, seed=3)
    first, second = (torch.cat([next(batches)["input_ids"][:, 0] for _ in range(6)]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(66)) and first != second
    assert len(read(pair[1], torch.zeros(1000, 4).long(), None, Tuning()).held_out) == MOST_HELD_OUT


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pifa(capsys, tmp_path):
    """``pifa(*arguments)``: ``pifa tune`` on a text, its exit code, standard output and standard error."""
    (tmp_path / "text.txt").write_text(TEXT)
    settings = ("--steps", 6, "--batch", 2, "--length", 32, "--lr", 1e-3, "--text", tmp_path / "text.txt")

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in ("tune", *settings, *arguments)])
        return code, *capsys.readouterr()

    return call


def test_the_command_writes_a_folder_that_loads_and_can_be_tuned_again(pifa, language_folder, tmp_path):
    run_id = pifa_compile.compress(load_model(language_folder)[0], Svd(density=0.5, rank_multiple=1)).run_id
    out = tmp_path / "out"
    code, printed, err = pifa(language_folder, "--out", out, "--density", 0.5, "--json")
    found = json.loads(printed)
    assert (code, found["path"], found["done"]) == (0, str(out), 6)
    assert found["after"]["divergence"] < found["before"]["divergence"]
    assert "6/6" in err and "Traceback" not in err
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, PifaLinear)
    assert loaded.config.quantization_config.run == run_id
    assert [told["after"] for told in loaded.config.quantization_config.tuned] == [found["after"]]
    card = (out / "README.md").read_text()
    assert "## How it was tuned" in card and "6 steps on" in card and "text.txt" in card and str(tmp_path) not in card
    figures = f"| perplexity | {found['before']['perplexity']:.4f} | {found['after']['perplexity']:.4f} |"
    assert figures in " ".join(card.split())
    assert "Errors are relative" not in card, "they are of the factors as they were before"

    again = tmp_path / "again"
    assert pifa(out, "--out", again)[0] == cli.USAGE, "the dense model is not known"
    assert pifa(out, "--out", again, "--loss", "lm", "--density", 0.5)[0] == cli.USAGE
    code, printed, _ = pifa(out, "--out", again, "--teacher", language_folder)
    assert code == 0 and "6 of 6 steps (distill" in printed and "perplexity" in printed
    second = AutoModelForCausalLM.from_pretrained(again)
    assert second.config.quantization_config.run == run_id
    assert second.config.quantization_config.tuned[0] == loaded.config.quantization_config.tuned[0]
    assert len(second.config.quantization_config.tuned) == 2
    card = (again / "README.md").read_text()
    assert card.index("### Tuning 1") < card.index("### Tuning 2") and card.count("6 steps on") == 2
    assert not torch.equal(
        second.model.layers[0].mlp.up_proj.coefficients, loaded.model.layers[0].mlp.up_proj.coefficients
    )


def test_the_command_refuses_in_a_line(pifa, language_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, code, word in [
        (["/no/such/model", "--out", tmp_path / "full"], cli.FAILED, "not an empty folder"),
        (["/no/such/model", "--out", tmp_path / "new"], cli.FAILED, "there is no such folder"),
        (["/no/such/model", "--out", tmp_path / "new", "--steps", 0], cli.USAGE, "steps is 0"),
        (["/no/such/model", "--out", tmp_path / "new", "--loss", "lm", "--teacher", "x"], cli.USAGE, "no use for"),
        ([language_folder, "--out", tmp_path / "new"], cli.FAILED, "compress it first"),
    ]:
        found = pifa(*arguments)
        assert found[:2] == (code, "") and word in found[2] and "Traceback" not in found[2]
    assert not (tmp_path / "new").exists()


def test_an_interrupted_command_writes_what_was_reached(pifa, language_folder, tmp_path, monkeypatch, caplog):
    pifa_compile.compress(load_model(language_folder)[0], Svd(density=0.5), progress=False)

    def interrupt(self, batch, loss=tasks._NextTokens.loss):
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(tasks._NextTokens, "loss", interrupt)
    code, printed, _ = pifa(language_folder, "--out", tmp_path / "out", "--loss", "lm", "--json")
    assert code == 0 and json.loads(printed)["interrupted"] and "interrupted after step 0" in caplog.text
    assert "the start, since no state was better" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr("pifa_compile.tuning.train", lambda *_: interrupt(None, None))
    code, printed, err = pifa(language_folder, "--out", tmp_path / "other", "--loss", "lm")
    assert (code, printed) == (130, "") and err.endswith("pifa: error: interrupted; the model was not written\n")
