"""The benchmarks run, count losing rows, and check what they time; how fast anything is, no test says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from pifa_compile import cli, cost
from pifa_compile import machine as machines
from pifa_compile.bench import kernels, models, report, shapes, timing
from pifa_compile.bench.factors import put_random_factors
from pifa_compile.errors import InputError
from pifa_compile.store import Store


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine that need not be measured, and shapes that are small."""
    rates = {name: {1: 1e11} for name in ("float32", "bfloat16", "float16")}
    profile = cost.Profile(machines.device_name(), 1e10, rates, 1e9, 1e-5)
    monkeypatch.setattr(machines, "measure_profile", lambda device="cpu": profile)
    monkeypatch.setattr(kernels, "MOST_LAYERS", 2)
    monkeypatch.setattr(models, "MOST_BLOCKS", 2)
    monkeypatch.setitem(shapes.SHAPES, "tiny", {"square": (64, 64), "flat": (48, 8)})
    monkeypatch.setitem(models.BLOCKS, "tiny", lambda: models.Block(64, 96))
    monkeypatch.setitem(models.RANDOM, "tiny", {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1})
    return profile


def test_turns_give_a_median_for_each():
    calls = {"a": 0, "b": 0}

    def run(name):
        calls[name] += 1

    taken = timing.in_turns({name: lambda name=name: run(name) for name in calls}, rounds=3, seconds=1e-5)
    assert set(taken) == {"a", "b"} and all(seconds > 0 for seconds in taken.values())
    assert min(calls.values()) >= 3


def test_kernels_show_every_form_and_check_it(tmp_path):
    found = kernels.bench_kernels(["tiny"], tokens=(2,), dtypes=(torch.bfloat16,), freezing=(False,), rounds=1)
    assert {row["freezing"] for row in found.rows} == {False}
    forms = ["dense", "pair", "pifa", "pifa folded", "pifa groups"]
    assert [row["form"] for row in found.rows if row["layer"] == "tiny: square"] == forms
    assert [row["form"] for row in found.rows if row["layer"] == "tiny: flat"] == forms[:-1]
    assert all(row["right"] and row["of roof"] > 0 for row in found.rows)
    assert all(row["of dense"] == 1 for row in found.rows if row["form"] == "dense")
    assert {row["rank"] for row in found.rows} == {32, 4}
    assert {(row["caches"], row["layers"]) for row in found.rows} == {("cold", 2)}
    found.save(tmp_path / "results" / "rows.json")
    data = json.loads((tmp_path / "results" / "rows.json").read_text())
    assert len(data["rows"]) == 9 and data["machine"]["threads"] == torch.get_num_threads()
    assert data["machine"]["versions"]["torch"]


def test_a_wrong_form_gets_no_tick(monkeypatch):
    original = kernels._candidates

    def spoiled(*arguments):
        found = original(*arguments)
        return found | {"pair": replace(found["pair"], weight=lambda i: found["pair"].weight(i) + 0.1)}

    monkeypatch.setattr(kernels, "_candidates", spoiled)
    arguments = {"tokens": (2,), "dtypes": (torch.float32,), "freezing": (False,), "rounds": 1}
    found = kernels.bench_kernels(["tiny"], **arguments)
    assert {row["form"] for row in found.rows if not row["right"]} == {"pair"}
    assert "NO" in str(found)


def test_blocks_run_through_the_backend_with_factors_of_the_density():
    torch.manual_seed(0)
    settings = {"densities": (0.6,), "tokens": (3,), "dtypes": (torch.float32,), "rounds": 1}
    found = models.bench_layers(["tiny"], freezing=(False, True), **settings)
    assert [(row["freezing"], row["blocks"]) for row in found.rows] == [(False, 2), (True, 2)]
    assert all(row["right"] and row["error"] < 1e-5 for row in found.rows)
    (warm,) = models.bench_layers(["tiny"], freezing=(False,), cold=False, **settings).rows
    assert warm["blocks"] == 1 and warm["right"]


def test_blocks_take_turns_until_caches_are_too_small_for_them():
    numbers = sum(p.numel() for p in models.BLOCKS["block-2048"]().parameters())
    assert timing.beyond_caches(0.55 * 2 * numbers, 8) == 5 and timing.beyond_caches(0.55 * 4 * numbers, 8) == 3
    assert timing.beyond_caches(64, 8) == 8


def test_what_a_pass_gave_is_shown_by_rows_without_it(monkeypatch):
    seen, original = [], models.pipeline.run_passes

    def recording(gm, context, **settings):
        seen.append([step.name for step in models.pipeline.PIPELINE])
        return original(gm, context, **settings)

    monkeypatch.setattr("pifa_compile.backend.run_passes", recording)
    settings = {"densities": (0.6,), "tokens": (3,), "dtypes": (torch.float32,), "freezing": (False,), "rounds": 1}
    found = models.bench_layers(["tiny"], without=("fold", "group"), **settings)
    assert [row["without"] for row in found.rows] == ["", "fold", "group"] and all(row["right"] for row in found.rows)
    assert [sorted({"fold", "group"} - set(names)) for names in seen] == [[], ["fold"], ["group"]]
    with pytest.raises(InputError, match="fold, group"):
        models.bench_layers(["tiny"], without=("replace",), **settings)


def test_random_factors_are_a_run_like_any_other(store):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    put_random_factors(model, 0.6, store)
    (run,) = Store(store.root).runs()
    assert run.complete
    assert [record.object is not None for record in run.layers] == [True, False]
    assert run.layers[0].numbers <= 0.6 * 64 * 64


def test_a_model_end_to_end_and_names_that_nobody_knows():
    found = models.bench_model("tiny", densities=(0.6,), batches=(2,), length=8, rounds=1)
    assert [row["right"] for row in found.rows] == [True]
    with pytest.raises(InputError, match="square-2048"):
        shapes.shapes("sqare-2048")
    with pytest.raises(InputError, match="block-2048"):
        models.bench_layers(["blok-2048"])


def test_compiling_tells_hashing_and_reading_apart(monkeypatch, tmp_path):
    torch.manual_seed(0)  # as in the process that compiles
    put_random_factors(models._model("tiny", None), 0.6, Store(tmp_path / "factors"))
    original = Store.factors
    found = models.compile_once("tiny", "pifa", tmp_path / "factors")
    assert found["s hashing"] > 0 and found["s reading"] > 0
    assert found["s"] > found["s hashing"] + found["s reading"]
    assert Store.factors is original
    given = iter([found | {"s": s} for s in (4.0, 2.0, 3.0, 1.0)])  # inductor cold, warm, ours cold, warm
    monkeypatch.setattr(models, "_in_child", lambda *arguments: next(given))
    rows = models.bench_compile("tiny", rounds=1).rows
    assert [(row["caches"], row["of dense"]) for row in rows] == [("cold", 0.75), ("warm", 0.5)]
    assert all(row["s reading"] == found["s reading"] for row in rows)


def test_plots_are_drawn_or_say_what_they_need(tmp_path):
    densities = (0.45, 0.8)
    found = kernels.bench_kernels(
        ["tiny"], densities=densities, tokens=(2,), dtypes=(torch.float32,), freezing=(False,), rounds=1
    )
    assert len({round(row["density"], 1) for row in found.rows if row["form"] == "pifa"}) == 2
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pifa-compile\\[plot\\]"):
            report.plot(found, tmp_path)
    else:
        names = [f"{name}.{kind}" for name in ("tokens", "density", "roofline") for kind in ("png", "svg")]
        assert [path.name for path in report.plot(found, tmp_path)] == names
        assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names[::2])
        for name, words in (("tokens", "tokens N"), ("density", "numbers kept"), ("roofline", "FLOP per byte")):
            assert words in (tmp_path / f"{name}.svg").read_text()


def test_the_command(capsys, tmp_path):
    arguments = ["bench", "kernels", "tiny", "--tokens", "2", "--dtype", "float32", "--rounds", "1", "--json"]
    assert cli.main([*arguments, "--out", str(tmp_path / "rows.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert cli.main(["bench", "model", "tiny", "--plot", str(tmp_path)]) == cli.USAGE
    assert cli.main(["bench", "model", "tiny", "--warm"]) == cli.USAGE
    assert cli.main(["bench", "kernels", "tiny", "--without", "fold"]) == cli.USAGE
    assert "--without is for layers and model" in capsys.readouterr().err
