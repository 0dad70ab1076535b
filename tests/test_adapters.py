"""LoRA of PEFT on factored layers, and transformers' Trainer: what trains, is saved, is read again and is merged."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import pifa_compile
from pifa_compile import PifaLinear, Svd
from pifa_compile.errors import InputError

pytest.importorskip("peft", reason="the extra 'tune' is not installed")
pytest.importorskip("accelerate", reason="the extra 'tune' is not installed")

from peft import LoraConfig, PeftModel, get_peft_model

from pifa_compile.hf import lora
from pifa_compile.hf.adapters import FactoredLora

IDS = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(0))


def prepared(model, form="pifa"):
    pifa_compile.compress(model.eval(), Svd(density=0.5, rank_multiple=1, form=form), progress=False)
    return pifa_compile.apply_(model)


@pytest.fixture
def small(language_folder):
    return prepared(AutoModelForCausalLM.from_pretrained(language_folder))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def trained(model, config):
    """With adapters that have made some steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of a layer type that PEFT does not know
        adapted = get_peft_model(copy.deepcopy(model), lora(config))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return adapted.eval()


def test_adapters_train_beside_factors_that_stay_and_are_read_again(small, tmp_path):
    before = copy.deepcopy(small.state_dict())
    adapted = trained(small, LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], r=4))
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, FactoredLora) and isinstance(layer.base_layer, PifaLinear)
    after = {n.replace("base_model.model.", "").replace("base_layer.", ""): t for n, t in adapted.state_dict().items()}
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    adapted.save_pretrained(tmp_path)
    config = lora(LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(small), tmp_path, config=config)
    assert torch.equal(logits(again), logits(adapted)) and not torch.allclose(logits(small), logits(adapted), atol=1e-3)


@pytest.mark.parametrize("safe", [False, True])
def test_to_merge_is_refused_until_the_layers_are_dense(small, safe):
    adapted = trained(small, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    exact = logits(adapted)
    with pytest.raises(InputError, match=r"cannot be merged into a factored layer.*restore_"):
        adapted.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(adapted), exact)
    merged = pifa_compile.restore_(adapted).merge_and_unload(safe_merge=safe)
    assert type(merged.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.allclose(logits(merged), exact, atol=1e-5)


@pytest.mark.parametrize("form", ["pifa", "pair"])
def test_layers_that_hold_their_weight_transposed_are_merged_the_right_way_round(form):
    """GPT-2's Conv1D; its c_proj of the attention is square, so that a mistake would have a fitting shape."""
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=256, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = prepared(GPT2LMHeadModel(config), form)
    adapted = trained(model, LoraConfig(target_modules=["attn.c_proj", "c_fc"], r=4))
    exact = logits(adapted)
    merged = pifa_compile.restore_(adapted).merge_and_unload()
    assert torch.allclose(logits(merged), exact, atol=1e-5)


def test_what_peft_cannot_have_is_refused(small):
    with pytest.raises(InputError, match=r"all-linear does not mean factored layers"):
        lora(LoraConfig(target_modules="all-linear"))
    model = prepared(nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Linear(8, 8)))
    with pytest.raises(InputError, match="0 is a 1x1 convolution"):
        get_peft_model(model, lora(LoraConfig(target_modules=["0"])))


def test_trainer_trains_factors_and_what_it_saves_is_loaded(small, tmp_path):
    pifa_compile.export(small, tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    layer = model.model.layers[1].mlp.down_proj
    before = layer.pivot_rows.detach().clone(), layer.coefficients.detach().clone()
    settings = TrainingArguments(
        tmp_path / "runs", max_steps=6, learning_rate=1e-3, per_device_train_batch_size=4, logging_steps=1,
        save_steps=6, report_to="none", disable_tqdm=True, use_cpu=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert not torch.equal(layer.pivot_rows, before[0]) and not torch.equal(layer.coefficients, before[1])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "checkpoint-6")
    assert isinstance(again.model.layers[1].mlp.down_proj, PifaLinear)
    assert torch.equal(again.model.layers[1].mlp.down_proj.coefficients, layer.coefficients)
