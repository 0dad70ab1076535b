"""bench/assisted.py counts what it says, on a model that drafts for itself and on one that is compressed."""

import copy

import assisted
import torch
from transformers import AutoModelForCausalLM


def test_a_model_accepts_all_of_its_own_drafts(language_folder):
    model = AutoModelForCausalLM.from_pretrained(language_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    prompts = assisted.cut(torch.arange(64), 8, 3)
    assert [prompt[0, 0].item() for prompt in prompts] == [0, 21, 42]
    found = assisted.measure(model, copy.deepcopy(model), prompts, 15, 4)
    assert found == assisted.Acceptance(tokens=45, calls=9, drafted=36, lossless=True)
    assert found.accepted == 1.0


def test_the_table_has_a_row_for_each_density(language_folder, tmp_path, capsys):
    (tmp_path / "text").write_text("some words to begin with, over and over again. " * 8)
    small = ["--prompts", "2", "--length", "8", "--tokens", "6", "--densities", "0.8", "0.5"]
    rows = assisted.main(
        [str(language_folder), str(tmp_path / "text"), "--calibration", str(tmp_path / "text"), *small]
    )
    assert [density for density, _ in rows] == [0.8, 0.5]
    assert all(row.lossless and row.tokens == 12 and 0 <= row.accepted <= 1 for _, row in rows)
    assert "accepted" in capsys.readouterr().out
