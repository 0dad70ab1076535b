"""bench/train.py: files are split apart, the model learns, and what is written can be loaded and measured."""

import json

import pytest
import torch
import train

from pifa_compile.loading import load_model

SMALL = ["--steps", "8", "--width", "32", "--layers", "1", "--vocabulary", "300", "--other", "strange"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources of three packages: many files of code that repeats itself, one copy, and files that are none."""
    root = tmp_path_factory.mktemp("sources")
    for package in ("common", "plain", "strange"):
        (root / package).mkdir()
        for i in range(70):
            lines = [f"def {package}_{i}_{j}(value):\n    return value + {j}\n" for j in range(40)]
            (root / package / f"part{i}.py").write_text("\n".join(lines))
    (root / "common" / "copy.py").write_text((root / "common" / "part0.py").read_text())
    (root / "common" / "short.py").write_text("x = 1\n")
    (root / "common" / "latin.py").write_bytes(b"# \xe9" * 200)
    return root


def test_files_are_split_apart(folder):
    found = train.find_sources([folder], "strange", 10**9, seed=0)
    parts = [set(found.training), set(found.validation), set(found.other)]
    assert [len(part) for part in parts] == [len(found.training), len(found.validation), len(found.other)]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert len(parts[0] | parts[1]) == 140
    assert 0 < len(parts[1]) < 20
    assert len(parts[2]) == 70
    assert all("strange" in text for text in parts[2])
    assert not any("strange" in text for text in parts[0] | parts[1])
    assert found == train.find_sources([folder], "strange", 10**9, seed=0)
    assert sum(map(len, train.find_sources([folder], "strange", 20_000, seed=0).training)) < 25_000


def test_a_model_is_trained_written_and_measured(folder, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        for name in ("first", "second"):
            train.main([str(tmp_path / name), "--folder", str(folder), "--threads", "1", *SMALL])
    finally:
        torch.set_num_threads(threads)
    first, second = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("first", "second"))
    assert first["losses"] == second["losses"], "the seed is fixed"
    assert first["losses"][-1] < first["losses"][0] - 0.5
    model, tokenizer = load_model(tmp_path / "first")
    assert model.config.vocab_size == len(tokenizer) == 300
    text = "def f(x):\n\treturn 'naïve'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    calibration, validation, other = (
        (tmp_path / "first" / f"{name}.txt").read_text() for name in ("calibration", "validation", "other")
    )
    assert "strange" in other and "strange" not in calibration + validation
    assert not set(calibration.split("\n\n\n")) & set(validation.split("\n\n\n"))
    assert f"validation {first['perplexity']['validation']:.2f}" in capsys.readouterr().out
