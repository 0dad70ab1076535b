"""The main job: compress, compile and compare a real model, and a causal language model, in one table."""

from __future__ import annotations

import json

import pytest
import torch

from pifa_compile import Store, demo
from pifa_compile.cli import main
from pifa_compile.demo import run_demo


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(demo, "BATCHES", (1, 4))
    monkeypatch.setattr(demo, "SENTENCES", 16)
    monkeypatch.setattr(demo, "WINDOWS", 4)


@pytest.fixture
def causal(tmp_path):
    """A tiny random Llama with a tokenizer of bytes, saved as a checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, vocab_size=256,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a small text that is long enough for windows. " for i in range(400)))
    return tmp_path / "model", text


def test_minilm_on_real_english(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BATCHES", (4,))
    steps = []
    result = run_demo(densities=(0.8,), method="svd", out=tmp_path, seconds=0.1, say=steps.append)
    dense, ours = result.rows
    assert dense.quality["mean_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert 0.3 < ours.quality["mean_cosine"] < 1.0
    assert ours.replaced_numbers <= 0.8 * dense.replaced_numbers
    assert ours.model_numbers == dense.model_numbers - dense.replaced_numbers + ours.replaced_numbers
    assert ours.weights_mb < dense.weights_mb and ours.disk_mb < dense.disk_mb
    assert set(ours.milliseconds) == {4} and min(ours.milliseconds.values()) > 0
    (run,) = Store(result.store).runs()
    assert len(run.layers) == 37 and run.complete
    assert list(result.dump.rglob("graph.html")) and steps
    text = str(result)
    assert "16 docstrings of the Python standard library" in text
    assert str(result.store) in text and str(result.dump) in text and "of dense" in text


def test_a_causal_model_is_judged_by_perplexity_on_a_text(causal, tmp_path, capsys, monkeypatch):
    model, text = causal
    monkeypatch.setattr(demo, "run_demo", lambda *args, **kw: run_demo(*args, **kw, seconds=0.1))
    out = tmp_path / "out"
    arguments = ["demo", "--model", str(model), "--text", str(text), "--densities", "0.5", "--out", str(out), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    dense, ours = found["rows"]
    assert dense["quality"]["perplexity"] == pytest.approx(256, rel=0.2)  # an untrained model over 256 bytes
    assert ours["quality"]["perplexity"] != dense["quality"]["perplexity"]
    assert "4 windows of 256 tokens of the second half" in found["data"]
    assert found["method"] == "mpifa"


def test_a_missing_text_is_one_line_and_exit_code_1(causal, tmp_path, capsys):
    assert main(["demo", "--model", str(causal[0]), "--text", str(tmp_path / "no.txt"), "--out", str(tmp_path)]) == 1
    assert "cannot read the text" in capsys.readouterr().err
