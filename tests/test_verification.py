"""pifa verify: damage is found, a run of another model is told apart, quality is measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import pifa_compile
from pifa_compile import Store, Svd
from pifa_compile.cli import main
from pifa_compile.compression import layer
from pifa_compile.loading import load_model
from pifa_compile.verification import verify


@pytest.fixture
def compressed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    store = Store(tmp_path / "store")
    run = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), store=store, progress=False).run
    return model, store, run


def damage(store, run):
    path = next(p for p in (store.root / "objects").rglob("*.safetensors") if run.layers[0].object in p.name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_whole_store_of_this_model_is_verified(compressed):
    model, store, run = compressed
    found = verify(store, model=model)
    assert found.problems == [] and found.runs == [run.run_id]
    assert "verified" in str(found)


def test_one_flipped_bit_is_found_and_named(compressed):
    _, store, run = compressed
    damage(store, run)
    (problem,) = verify(store).problems
    assert run.layers[0].name in problem


def test_a_run_of_another_model_is_told(compressed):
    _, store, run = compressed
    other = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    (problem,) = verify(store, model=other).problems
    assert f"{run.run_id} knows 0 of the 2" in problem


def test_the_command_says_3_for_a_damaged_store_and_0_for_a_whole_one(compressed, capsys):
    _, store, run = compressed
    assert main(["verify", "--store", str(store.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    damage(store, run)
    assert main(["verify", run.run_id, "--store", str(store.root)]) == 3
    assert "problem" in capsys.readouterr().out


def test_compressing_again_makes_what_is_damaged_anew_and_only_that(compressed, monkeypatch, caplog):
    model, store, run = compressed
    made, factorize = [], layer.factorize
    monkeypatch.setattr(layer, "factorize", lambda *args, **kwargs: made.append(1) or factorize(*args, **kwargs))
    damage(store, run)
    again = pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), store=store, progress=False).run
    assert len(made) == 1 and verify(store).problems == []
    assert {r.name: r.object for r in again.layers} == {r.name: r.object for r in run.layers}
    (message,) = caplog.messages  # and no word of factors that changed
    assert "the factors of 1 layers are damaged or missing and are made again: 0" in message


def test_factors_that_come_out_otherwise_than_those_that_were_damaged_are_told_of(compressed, monkeypatch, caplog):
    model, store, run = compressed
    factorize = layer.factorize

    def other(low_rank, *args, **kwargs):
        return factorize(replace(low_rank, coordinates=low_rank.coordinates * 2), *args, **kwargs)

    monkeypatch.setattr(layer, "factorize", other)
    damage(store, run)
    pifa_compile.compress(model, Svd(density=0.6, rank_multiple=1), store=store, progress=False)
    assert "the factors of layer '0' are others than those that were lost" in caplog.messages[-1]


def test_quality_of_an_encoder_on_a_text(encoder_folder, tmp_path, capsys):
    model, _ = load_model(encoder_folder)
    store = Store(tmp_path / "store")
    run = pifa_compile.compress(model, Svd(density=0.9, rank_multiple=1), store=store, progress=False).run_id
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Sentence number {i} speaks of the weather in month {i % 12}." for i in range(8)))
    command = ["verify", run, "--store", str(store.root), "--json"]
    assert main([*command, "--model", str(encoder_folder), "--text", str(text)]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"][run]
    assert 0.5 < quality["mean_cosine"] <= 1.0001


def test_a_text_without_a_model_is_a_usage_error(compressed, tmp_path):
    assert main(["verify", "--store", str(compressed[1].root), "--text", str(tmp_path / "t")]) == 2
