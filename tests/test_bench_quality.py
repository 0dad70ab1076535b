"""bench/quality.py: what its rows say, that they are not computed twice, and what its checks find."""

import itertools
import json
import math
from argparse import Namespace

import pytest
import quality
import torch
from baselines import STARTS
from tables import DEFAULTS, DENSITIES, METHODS, ORDER

from pifa_compile.loading import load_model
from pifa_compile.recipes import Mpifa, Recipe

TEXT = "".join(f"def f{i}(x):\n    return x + {i * i % 17}\n" for i in range(999))


@pytest.fixture
def bench(language_folder, tmp_path, capsys):
    """``bench(*arguments)``: exit code, standard output and the rows in the file; small sizes unless said otherwise."""
    for name in ("judge.txt", "calibration.txt"):
        (tmp_path / name).write_text(TEXT if name == "judge.txt" else TEXT.replace("return", "yield"))

    def call(*arguments, model=language_folder):
        file = tmp_path / "rows.json"
        command = [model, "--windows", 3, "--calibration-windows", 8, "--json", file, *arguments]
        code = quality.main([str(word) for word in command])
        return code, capsys.readouterr().out, json.loads(file.read_text())

    return call


def test_rows_are_those_of_the_recipes_and_are_not_made_twice(bench, tmp_path, monkeypatch):
    texts = [tmp_path / "judge.txt", "--calibration", tmp_path / "calibration.txt", "--densities", 0.7, 0.5]
    code, out, rows = bench(*texts, "--methods", "svd pair", "mpifa", "magnitude 2:4")
    assert code == 0
    assert [(r["case"], r["density"]) for r in rows] == [
        ("dense", 1.0),
        ("svd pair", 0.7),
        ("mpifa", 0.7),
        ("svd pair", 0.5),
        ("mpifa", 0.5),
        ("magnitude 2:4", 0.5625),
    ]
    for row in rows:
        assert row["excess"]["judge.txt"] == pytest.approx(row["scores"]["judge.txt"] - rows[0]["scores"]["judge.txt"])
        assert set(row["made"]) >= {"revision", "versions", "machine", "calibration_windows"}
        if "recipe" in row:
            assert row["density"] - 0.04 < row["achieved"] <= row["density"]
            assert row["recipe"]["rank_multiple"] == 1
    assert rows[2]["recipe"]["windows"] == 8
    assert rows[3]["scores"]["judge.txt"] > rows[0]["scores"]["judge.txt"] > 1
    assert "judge.txt: 3 windows of 256 tokens" in out
    monkeypatch.setattr(quality, "case_row", lambda *_: pytest.fail("computed again"))
    assert bench(*texts, "--methods", "svd pair", "mpifa", "magnitude 2:4")[2] == rows
    with pytest.raises(BaseException, match="computed again"):
        bench(*texts, "--methods", "svd pair", "mpifa", "--calibration-windows", "9")


def test_a_picture_has_a_line_for_every_method_and_a_panel_for_every_text(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    excess = {"first.txt": 2.5, "second.txt": 3.5}
    rows = [{"case": "dense", "achieved": 1.0, "excess": dict.fromkeys(excess, 0.0)}]
    rows += [{"case": "mpifa", "achieved": d, "excess": excess, "recipe": {}} for d in (0.5, 0.8)]
    rows += [{"case": "wanda 2:4", "achieved": 0.5625, "excess": excess, "layer_error": 1.0}]
    for kind in ("svg", "png"):
        quality.plot(rows, "perplexity", tmp_path / f"rows.{kind}")
    picture = (tmp_path / "rows.svg").read_text()
    assert all(f"<!-- {word} -->" in picture for word in ("first.txt", "second.txt", "mpifa", "wanda 2:4", "density"))
    assert "<!-- dense -->" not in picture
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_baseline_is_measured_as_it_was_pruned(bench, tmp_path, language_folder):
    import baselines

    from pifa_compile.compression.calibration import calibrate_on
    from pifa_compile.evaluation import perplexity, windows_of

    arguments = [tmp_path / "judge.txt", "--calibration", tmp_path / "calibration.txt", "--methods", *baselines.PRUNERS]
    code, out, rows = bench(*arguments)
    errors = [row["layer_error"] for row in rows[1:]]
    assert code == 0
    assert errors[2] < errors[1] < errors[0]
    assert f"sparsegpt 2:4 {errors[2]:.4f} < wanda 2:4 {errors[1]:.4f} < magnitude 2:4 {errors[0]:.4f}: holds" in out
    model, tokenizer = load_model(language_folder)
    calibration = calibrate_on(model, (tmp_path / "calibration.txt").read_text(), tokenizer, windows=8)
    assert baselines.prune_(model, baselines.sparsegpt, calibration.batches) == pytest.approx(errors[2], rel=1e-5)
    found = perplexity(model, windows_of(TEXT, tokenizer, most=3))
    assert rows[3]["scores"]["judge.txt"] == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("start", ["pruned", "int8"])
def test_a_compression_may_begin_with_another_model(bench, tmp_path, start):
    arguments = [tmp_path / "judge.txt", "--calibration", tmp_path / "calibration.txt"]
    code, _, rows = bench(*arguments, "--methods", "svd pair", "--densities", 0.9, "--start", start)
    assert code == 0
    assert [r["case"] for r in rows] == ["dense", start, "svd pair"]
    assert rows[1]["excess"]["judge.txt"] != 0
    assert rows[2]["made"]["start"] == start


def test_tables_of_defaults_judge_on_calibration_text_that_is_held_out(bench, tmp_path):
    options = Namespace(table="mixing", texts=[str(tmp_path / "judge.txt")], calibration=tmp_path / "calibration.txt")
    arguments = [*options.texts, "--calibration", options.calibration, "--table", "mixing", "--densities", 0.5]
    code, out, rows = bench(*arguments, "--methods", "mixing 0", "mixing 1")
    assert code == 0
    assert [r["case"] for r in rows] == ["dense", "mixing 0", "mixing 1"]
    assert [r["recipe"]["mixing"] for r in rows[1:]] == [0, 1]
    assert set(rows[0]["scores"]) == {"judge.txt", "held-out calibration"}
    assert "order" not in out
    with pytest.raises(SystemExit, match="no case svd pair in table mixing"):
        bench(*arguments, "--methods", "svd pair")


def test_its_own_text_is_a_case(bench, tmp_path):
    arguments = [tmp_path / "judge.txt", "--calibration", tmp_path / "calibration.txt", "--table", "text"]
    rows = bench(*arguments, "--densities", 0.6, "--calibration-windows", 2)[2]
    assert [r["case"] for r in rows[1:]] == ["a text", "its own text"]
    assert rows[1]["run"] != rows[2]["run"]


def test_an_encoder_is_judged_by_cosine_on_docstrings_of_other_files(bench, encoder_folder, monkeypatch):
    seen = {"a/b.py": "one", "c.py": "two", "d/e.py": "three", "f.py": "four", "g.py": "five", "h.py": "six"}

    def docstrings(chosen):
        lines = [f"This is sentence number {word} of a file of the library." for p, word in seen.items() if chosen(p)]
        return ["A sentence that is in every file of the library.", *lines * 2]

    monkeypatch.setattr(quality, "standard_library_docstrings", docstrings)
    first, judged = quality._docstrings()
    assert len(first) > 1 and len(judged) > 3
    assert not set(first) & set(judged)
    _, out, rows = bench("--methods", "svd pair", "svd-llm pair", "--densities", 0.5, model=encoder_folder)
    assert rows[0]["scores"]["docstrings"] == pytest.approx(0, abs=1e-5)
    assert 0 < rows[1]["scores"]["docstrings"] < 2
    assert rows[1]["scores"]["docstrings"] == pytest.approx(1 - rows[1]["figures"]["docstrings"]["mean_cosine"])
    assert "1 - cosine" in out


def test_every_case_is_a_recipe_at_every_density():
    for cases in (METHODS, *DEFAULTS.values()):
        for case in cases.values():
            if case.kind is not None:
                assert all(isinstance(case.recipe(d, 64), Recipe) for d in DENSITIES)
    assert METHODS["mpifa"].recipe(0.5, 64) == Mpifa(density=0.5, rank_multiple=1)
    assert DEFAULTS["size"]["16 windows"].recipe(0.5, 64).windows == 16
    assert set(ORDER) <= set(METHODS)


def row(case, density, value, **more):
    return {"case": case, "density": density, "scores": {"t": value}} | more


def test_the_order_is_checked_at_each_density_with_a_tolerance():
    good = [row(name, d, value) for d in (0.8, 0.5) for name, value in zip(ORDER, (5, 6, 7, 8, 9), strict=True)]
    assert quality.check_order(good) == []
    assert quality.check_order([row("mpifa", 0.5, 6.02), row("mpifa uniform", 0.5, 6.0)]) == []
    assert quality.check_order([row("mpifa", 0.5, 9.0), row("mpifa uniform", 0.4, 6.0)]) == []
    (found,) = quality.check_order([*good[:5], *good[6:], row("mpifa", 0.5, 6.2)])
    assert found == "mpifa 6.2000 is above mpifa uniform 6.0000 at density 0.5 on t"


def test_baselines_out_of_order_fail():
    names = list(METHODS)[-3:]
    rows = [row(name, 0.5625, 1.0, layer_error=error) for name, error in zip(names, (3.0, 2.0, 2.5), strict=True)]
    assert quality.check_baselines(rows).endswith("FAILS")
    assert quality.check_baselines(rows[:2]) is None


def test_starts_change_what_a_row_follows_from(language_folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    options = {"model": str(language_folder), "texts": [str(tmp_path / "a.txt")], "calibration": None, "windows": 2}
    options |= {"table": "methods", "calibration_windows": 4, "store": tmp_path / "store"}
    subjects = {start: quality.open_subject(Namespace(**options, start=start)) for start in STARTS}
    assert len({subject.identity for subject in subjects.values()}) == len(STARTS)
    dense = subjects["dense"].texts["a.txt"].dense["perplexity"]
    assert all(s.texts["a.txt"].dense["perplexity"] == dense for s in subjects.values()), "read before the change"
    assert math.isfinite(dense)
    weights = [s.model.get_submodule("model.layers.0.mlp.up_proj").weight for s in subjects.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
