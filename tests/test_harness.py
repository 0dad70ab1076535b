"""Tasks of lm-eval: perplexity as a task is that of `pifa eval`, and what is missing is told."""

import importlib.util
import json
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd
from pifa_compile.cli import main
from pifa_compile.errors import InputError
from pifa_compile.loading import load_model

TEXT = "".join(f"def f{i}(x):\n    return x + {i * i % 17}\n" for i in range(99))
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra 'eval'")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(language_folder, store):
    model, _ = load_model(language_folder)
    return pifa_compile.compress(model, Svd(density=0.5, rank_multiple=1), store=store, progress=False).run


def evaluated(capsys, *words):
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@needs_lm_eval
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_as_a_task_is_that_of_the_table(language_folder, run, store, text, capsys, bos):
    words = [language_folder, "--text", text, "--windows", "6", "--length", "32", *(["--bos"] if bos else [])]
    plain = evaluated(capsys, *words)
    counters.clear()
    found = evaluated(capsys, *words, "--tasks", "perplexity")
    assert counters["pifa"]["replaced"] >= 14, "the run was not compiled"
    assert [v["name"] for v in found["variants"]] == [v["name"] for v in plain["variants"]] == ["dense", run.run_id]
    for ours, theirs in zip(plain["variants"], found["variants"], strict=True):
        wanted = ours["figures"][str(text)]["perplexity"]
        assert theirs["figures"] == {str(text): {"perplexity": pytest.approx(wanted, rel=1e-5)}}
        assert theirs["density"] == ours["density"] and theirs["model_density"] == ours["model_density"]
    assert found["protocol"][str(text)] == f"{plain['protocol'][str(text)]}; as a task of lm-eval"
    kept = {e.protocol: e.figures for e in store.evaluations(run.run_id)}
    assert kept[found["protocol"][str(text)]] == found["variants"][1]["figures"][str(text)]
    assert len(kept) == 2


TASK = """task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: ["x", "y"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""


@needs_lm_eval
def test_a_task_of_one_s_own_file_beside_perplexity(language_folder, run, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "ab" * i, "label": i % 2}) + "\n" for i in range(1, 9)))
    task = tmp_path / "parity.yaml"
    task.write_text(TASK.format(data=data))
    words = [language_folder, "--text", text, "--windows", "4", "--length", "16", "--limit", "3"]
    found = evaluated(capsys, *words, "--tasks", f"{task},perplexity")
    for variant in found["variants"]:
        assert set(variant["figures"]) == {"parity", str(text)}
        assert variant["figures"]["parity"]["acc"] * 3 == pytest.approx(round(variant["figures"]["parity"]["acc"] * 3))
        assert "acc_stderr" in variant["figures"]["parity"]
    assert "version 3 of the task; 3 documents at most, 0 shots" in found["protocol"]["parity"]
    assert found["protocol"][str(text)].endswith("as a task of lm-eval, 3 of the windows")
    assert main(["eval", *map(str, words), "--tasks", f"{task},perplexity"]) == 0
    assert "acc stderr" in capsys.readouterr().out


@needs_lm_eval
def test_an_exported_folder_is_measured_compiled_beside_the_dense_model(language_folder, run, text, tmp_path, capsys):
    model, _ = load_model(language_folder)
    out = pifa_compile.export(pifa_compile.apply_(model), tmp_path / "out", source=language_folder, run=run)
    words = ["--text", text, "--windows", "4", "--length", "16", "--tasks", "perplexity"]
    found = evaluated(capsys, out, "--dense", language_folder, *words)
    names = [v["name"] for v in found["variants"]]
    assert names == ["dense", run.run_id, f"{run.run_id}, exported"]
    by_run, by_folder = (v["figures"][str(text)]["perplexity"] for v in found["variants"][1:])
    assert by_folder == pytest.approx(by_run, rel=1e-5)


@needs_lm_eval
def test_several_stores_and_folders_stand_in_one_table(language_folder, run, store, text, tmp_path, capsys):
    model, _ = load_model(language_folder)
    other = pifa_compile.Store(tmp_path / "other")
    for density in (0.5, 0.8):
        pifa_compile.compress(model, Svd(density=density, rank_multiple=1), store=other, progress=False)
    better = other.runs()[1]
    folders = []
    for place, found in ((store, run), (other, better)):
        prepared = pifa_compile.apply_(load_model(language_folder)[0], run=found.run_id, store=place)
        folders.append(pifa_compile.export(prepared, tmp_path / found.run_id, source=language_folder, run=found))
    words = [*folders, "--dense", language_folder, "--store", store.root, "--store", other.root, "--text", text]
    words += ["--windows", "4", "--length", "16"]
    plain, found = evaluated(capsys, *words), evaluated(capsys, *words, "--tasks", "perplexity")
    assert [v["name"] for v in found["variants"]] == [
        *("dense", f"{run.run_id} in {store.root}", f"{run.run_id} in {other.root}", better.run_id),
        *(f"{run.run_id}, exported", f"{better.run_id}, exported"),
    ]
    assert [v["name"] for v in plain["variants"]] == [v["name"] for v in found["variants"]]
    for ours, theirs in zip(plain["variants"], found["variants"], strict=True):
        wanted = ours["figures"][str(text)]["perplexity"]
        assert theirs["figures"][str(text)]["perplexity"] == pytest.approx(wanted, rel=1e-5)


@needs_lm_eval
def test_a_task_that_there_is_not_is_named_with_the_nearest(language_folder, run, text, capsys):
    words = ["eval", str(language_folder), "--text", str(text)]
    assert main([*words, "--tasks", "perplexty"]) == 1
    assert "there is no task 'perplexty'; did you mean perplexity" in capsys.readouterr().err
    assert main([*words, "--tasks", "arc_eazy"]) == 1
    assert "arc_easy" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named(language_folder, run, text, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(language_folder), "--text", str(text), "--tasks", "perplexity"]) == 1
    assert "pip install 'pifa-compile[eval]'" in capsys.readouterr().err


def test_what_tasks_cannot_be_asked_of_is_refused(encoder_folder, language_folder, text, capsys):
    assert main(["eval", str(encoder_folder), "--text", str(text), "--tasks", "perplexity"]) == 1
    assert "no causal language model" in capsys.readouterr().err
    assert main(["eval", str(language_folder), "--text", str(text), "--limit", "3"]) == 2
    assert "--limit is of the documents of --tasks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(language_folder), "--tasks", "a,,b"])
    assert "no list of names" in capsys.readouterr().err


def test_a_run_of_another_model_is_refused(language_folder, store):
    from pifa_compile.harness import evaluate_tasks

    other = torch.nn.Sequential(torch.nn.Linear(16, 16))
    theirs = pifa_compile.compress(other, Svd(density=0.5, rank_multiple=1), store=store, progress=False).run
    model, tokenizer = load_model(language_folder)
    with pytest.raises(InputError, match="name another run"):
        evaluate_tasks(model, tokenizer, [(store, theirs)], ["perplexity"], {"a": TEXT})
