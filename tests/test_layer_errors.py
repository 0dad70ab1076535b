"""Errors of layers computed again: by brute force in float64, equal to the records on the run's own text, and
wrong ones found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pifa_compile
from pifa_compile import Mpifa, Svd, SvdLlm
from pifa_compile.cli import main
from pifa_compile.compression.calibration import calibrate_on
from pifa_compile.compression.inputs import input_moments
from pifa_compile.errors import RecipeError
from pifa_compile.layer_errors import check_layers, find_problem
from pifa_compile.loading import load_model
from pifa_compile.recipes import Calibrated, Joint
from pifa_compile.verification import verify

TEXT = "".join(f"def f{i}(x):\n    return x + {i * i % 17}\n" for i in range(99))
OTHER = "".join(f"class C{i}:\n    names = {['a', 'b'] * (i % 3)}\n" for i in range(99))
SETTINGS = {"density": 0.5, "rank_multiple": 1, "windows": 20, "window_length": 32}


@pytest.fixture(scope="module")
def language(language_folder):
    return load_model(language_folder)


@pytest.fixture
def texts(tmp_path):
    """The calibration text and another one, as files."""
    paths = tmp_path / "own.txt", tmp_path / "other.txt"
    for path, text in zip(paths, (TEXT, OTHER), strict=True):
        path.write_text(text)
    return paths


def compressed(language, recipe, store, text):
    settings = {"text": text, "tokenizer": language[1]} if isinstance(recipe, Calibrated) else {}
    return pifa_compile.compress(language[0], recipe, store=store, progress=False, **settings).run


@torch.no_grad()
def inputs(model, name, batches):
    """Rows that a linear layer reads (N x n, float64)."""
    rows = []
    hook = lambda module, arguments: rows.append(arguments[0].double().flatten(0, -2))  # noqa: E731
    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat(rows)


def test_input_moments_are_those_of_every_layer_in_the_whole_model(language, texts):
    model, tokenizer = language
    batches = calibrate_on(model, texts[0], tokenizer, windows=20, length=32).batches
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    seen = {}
    for group, moments in input_moments(model, names, batches):
        seen |= dict.fromkeys(group.names, moments)
    assert set(seen) == set(names)
    for name in names:
        x = inputs(model, name, batches)
        torch.testing.assert_close(seen[name].gram, x.T @ x, rtol=1e-6, atol=1e-6)
        assert seen[name].count == len(x)


@pytest.mark.parametrize("recipe", [{}, {"method": "x", "version": 1}, {"windows": "many"}, {"density": -1}], ids=str)
def test_a_run_that_tells_of_no_recipe_is_refused(language, store, texts, recipe):
    run = compressed(language, Svd(density=0.5), store, texts[0])
    told = run.header.recipe | recipe if recipe else {}
    with pytest.raises(RecipeError):
        check_layers(store, replace(run, header=replace(run.header, recipe=told)), *language, texts[1])


@pytest.mark.parametrize(
    "recipe", [Svd(density=0.5, rank_multiple=1), Joint(density=0.5), Mpifa(**SETTINGS)], ids=lambda r: r.method
)
def test_errors_on_another_text_are_those_of_brute_force(language, store, texts, recipe):
    model, tokenizer = language
    run = compressed(language, recipe, store, texts[0])
    found = check_layers(store, run, model, tokenizer, texts[1])
    assert not found.same_text
    assert found.problems == []
    assert [c.achieved for c in found.layers] == sorted((c.achieved for c in found.layers), reverse=True)
    assert {c.layer for c in found.layers} == {r.name for r in run.layers if r.object is not None}
    size = {"windows": 20, "length": 32} if recipe.method == "mpifa" else {"windows": 64, "length": 256}
    calibration = calibrate_on(model, texts[1], tokenizer, **size)
    batches = [*calibration.batches, *calibration.held_out]
    records = {r.name: r for r in run.layers}
    for check in found.layers[::3]:
        record = records[check.layer]
        names = [name for name, _ in record.layers]
        weight = torch.cat([model.get_submodule(name).weight.detach().double() for name in names])
        x = inputs(model, names[0], batches)
        wanted = x @ weight.T
        error = (x @ store.factors(record).weight().double().T - wanted).norm() / wanted.norm()
        s = torch.linalg.svdvals(wanted)
        assert check.achieved == pytest.approx(float(error), rel=1e-5)
        assert check.least == pytest.approx(float(s[record.rank :].norm() / s.norm()), rel=1e-4, abs=1e-7)
        assert (check.recorded, check.recorded_least) == (record.truncation, record.least_error)


@pytest.mark.parametrize("recipe", [SvdLlm(**SETTINGS), Mpifa(**SETTINGS)], ids=lambda r: r.method)
def test_on_its_own_text_a_run_has_the_errors_of_its_records(language, store, texts, recipe):
    run = compressed(language, recipe, store, texts[0])
    found = check_layers(store, run, *language, texts[0])
    assert found.same_text
    assert found.problems == []
    for check in found.layers:
        assert check.achieved == pytest.approx(check.recorded, rel=1e-5)
        assert check.least == pytest.approx(check.recorded_least, rel=1e-5, abs=1e-8)


def with_records(store, run, change):
    """The run with other records, written in its place."""
    store.delete_run(run.run_id)
    with store.write_run(run.header) as writer:
        for record in run.layers:
            writer.add(change(record))
        return writer.finish()


def test_a_record_that_says_too_little_is_found(language, store, texts, capsys, language_folder):
    run = compressed(language, SvdLlm(**SETTINGS), store, texts[0])
    name = "model.layers.1.mlp.up_proj"
    change = lambda r: replace(r, truncation=r.truncation / 2) if r.name == name else r  # noqa: E731
    with_records(store, run, change)
    assert verify(store, model=language[0], tokenizer=language[1], text=texts[1]).problems == []
    command = ["verify", "--store", str(store.root), "--model", str(language_folder), "--text"]
    assert main([*command, str(texts[1])]) == 0
    out = capsys.readouterr().out
    assert "on the text that the run held out" in out and "of this text" in out and "Wrong is" in out
    assert main([*command, str(texts[0]), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    (problem,) = found["problems"]
    assert f"{name}: its error is" in problem
    assert [c["layer"] for c in found["layers"][0]["layers"] if c["problem"]] == [name]


def test_a_record_of_a_data_free_run_is_checked_on_any_text(language, store, texts):
    run = compressed(language, Svd(density=0.5, rank_multiple=1), store, None)
    with_records(store, run, lambda r: replace(r, least_error=r.least_error and r.least_error * 0.9))
    problems = check_layers(store, store.run(run.run_id), *language, texts[1]).problems
    assert len(problems) == 14
    assert all("its least possible error is" in p for p in problems)


def test_factors_of_another_layer_are_found(language, store, texts):
    recipe = Mpifa(**SETTINGS | {"density": 0.8, "allocation": "uniform", "joint": ()})
    run = compressed(language, recipe, store, texts[0])
    first, second = (run.by_name[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    assert (first.shape, first.rank) == (second.shape, second.rank)
    swapped = {first.name: second, second.name: first}
    swap = lambda r: replace(r, object=swapped[r.name].object) if r.name in swapped else r  # noqa: E731
    changed = with_records(store, run, swap)
    assert store.verify(run.run_id) == [], "every object is whole, and has the shape of its record"
    problems = check_layers(store, changed, *language, texts[0]).problems
    assert len(problems) == 2
    assert all(".mlp.up_proj: its error is" in p for p in problems)


@pytest.mark.parametrize(
    ("here", "recorded", "again", "problem"),
    [
        ((0.3, 0.2), (0.1, 0.1), None, None),
        ((0.19, 0.2), (0.1, 0.1), None, "below the least possible"),
        ((1.2, 0.2), (0.4, 0.1), None, None),
        ((0.3, 0.2), (0.3, 0.2), (0.302, 0.2), None),
        ((0.3, 0.2), (0.3, 0.2), (0.31, 0.2), "its error is 0.31, the record says 0.3"),
        ((0.3, 0.2), (0.3, 0.2), (0.3, 0.21), "its least possible error is 0.21, the record says 0.2"),
        ((0.0, 0.0), (0.0, 0.0), (5e-7, 0.0), None),
    ],
)
def test_the_rule(here, recorded, again, problem):
    found = find_problem(here, recorded, again, 0.0)
    assert (found is None) == (problem is None)
    assert problem is None or problem in found


def test_an_encoder_is_checked_on_its_sentences(encoder_folder, store, tmp_path: Path):
    model, tokenizer = load_model(encoder_folder)
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"Sentence {i} of this text has {i % 7} words about month {i % 12}." for i in range(60)))
    recipe = SvdLlm(density=0.6, rank_multiple=1, windows=16, window_length=32, skip=["pooler*"])
    run = pifa_compile.compress(model, recipe, text=text, tokenizer=tokenizer, store=store, progress=False).run
    found = check_layers(store, run, model, tokenizer, text)
    assert found.same_text
    assert found.problems == []
    assert len(found.layers) == 12
    assert 0 < found.layers[0].achieved < 1
