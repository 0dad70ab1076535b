"""generate() on prepared models: prefill runs the modules, decoding the compiled graph, and both are one model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import CompileConfig

import pifa_compile
from pifa_compile import Joint, Svd

PROMPTS = ("def add(a, b):", "x =", "for i in range(10):\n")


@pytest.fixture
def dense(language_folder):
    """A random language model of bytes, sharp enough that its likeliest tokens are clear of rounding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(language_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def small(dense):
    """The same with factored layers, some of which share rows."""
    model = copy.deepcopy(dense)
    run = pifa_compile.compress(model, Joint(density=0.7, rank_multiple=1), progress=False).run_id
    return pifa_compile.apply_(model, run=run)


@pytest.fixture
def tokenizer(language_folder):
    return transformers.AutoTokenizer.from_pretrained(language_folder, padding_side="left")


def compile_config(**settings):
    """What turns compilation on for a CPU too."""
    config = CompileConfig(**{"backend": "pifa", "mode": None, "options": {"inner": "eager"}} | settings)
    config._compile_all_devices = True
    return config


def generate(model, tokenizer, prompts=PROMPTS, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id} | settings
    return model.generate(**tokenizer(list(prompts), return_tensors="pt", padding=True), **settings)


def test_compiled_decoding_after_an_eager_prefill_gives_the_tokens_of_the_modules(small, tokenizer):
    expected = generate(small, tokenizer)
    small.generation_config.cache_implementation = "static"
    small.generation_config.compile_config = compile_config()
    assert torch.equal(generate(small, tokenizer), expected)
    assert counters["pifa"]["prepared"] == 14, "decoding was compiled, the prefill was not"


def test_inductor_with_the_mode_that_generate_has_by_default(small, tokenizer):
    small.model.layers, small.config.num_hidden_layers = small.model.layers[:1], 1
    expected = generate(small, tokenizer, max_new_tokens=4)
    config = compile_config(mode=CompileConfig().mode, options=None)
    settings = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(generate(small, tokenizer, max_new_tokens=4, **settings), expected)
    assert counters["pifa"]["prepared"] == 7


def test_beam_search_which_transformers_does_not_compile_by_itself(small, tokenizer):
    expected = generate(small, tokenizer, num_beams=3)
    small.compile(backend="pifa", options={"inner": "eager"})
    assert torch.equal(generate(small, tokenizer, num_beams=3, cache_implementation="static"), expected)
    assert counters["pifa"]["prepared"] == 28, "one graph for the prefill and one for decoding"


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead", "inner": "eager"}, {"inner": "eager"}])
def test_options_with_a_mode_among_them(small, tokenizer, options):
    expected = generate(small, tokenizer)
    settings = {"cache_implementation": "static", "compile_config": compile_config(options=options)}
    assert torch.equal(generate(small, tokenizer, **settings), expected)
    assert counters["pifa"]["prepared"] == 14


def test_options_reach_the_backend_from_the_environment_beside_a_mode(dense, tokenizer, monkeypatch):
    """A transparent model at one of two densities, with the mode that generate() compiles with by default."""
    runs = [pifa_compile.compress(dense, Svd(density=d, rank_multiple=1), progress=False).run_id for d in (0.8, 0.4)]
    monkeypatch.setenv("PIFA_RUN", runs[1])
    monkeypatch.setenv("PIFA_INNER", "eager")
    dense.requires_grad_(False)
    settings = {
        "cache_implementation": "static",
        "compile_config": compile_config(mode=CompileConfig().mode, options=None),
    }
    generate(dense, tokenizer, **settings)
    assert counters["pifa"]["replaced"] == 14


def test_unequal_prompts_padded_on_the_left_are_continued_as_each_alone(small, tokenizer):
    settings = {"cache_implementation": "static", "compile_config": compile_config()}
    together = generate(small, tokenizer, **settings)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = generate(small, tokenizer, [prompt], **settings)[0]
        assert torch.equal(row[-8:], alone[-8:])


def test_streaming(small, tokenizer, capsys):
    settings = {"cache_implementation": "static", "compile_config": compile_config()}
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    tokens = generate(small, tokenizer, PROMPTS[:1], streamer=streamer, **settings)[0, -8:]
    assert capsys.readouterr().out.strip() == tokenizer.decode(tokens).strip()


@pytest.mark.parametrize("compiled", [False, True])
def test_assisted_generation_drafts_with_the_small_model_and_loses_nothing(dense, small, tokenizer, compiled):
    expected = generate(dense, tokenizer, PROMPTS[:1], max_new_tokens=24)
    passes = []
    small.register_forward_hook(lambda *_: passes.append(1))
    for layer in small.model.layers if compiled else ():
        layer.mlp.compile(backend="pifa", options={"inner": "eager"}, dynamic=True)
    assert torch.equal(generate(dense, tokenizer, PROMPTS[:1], max_new_tokens=24, assistant_model=small), expected)
    assert len(passes) > 1
    assert bool(counters["pifa"]["prepared"]) == compiled


def test_a_model_that_was_loaded_generates_as_the_one_that_was_saved(small, tokenizer, tmp_path):
    expected = generate(small, tokenizer)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(pifa_compile.export(small, tmp_path / "out"))
    assert torch.equal(generate(loaded, tokenizer), expected)
    settings = {"cache_implementation": "static", "compile_config": compile_config()}
    assert torch.equal(generate(loaded, tokenizer, **settings), expected)
    assert counters["pifa"]["prepared"] == 14, "transformers compiles it, because the quantizer says that it may"
