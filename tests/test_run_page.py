"""The page of a run: its data, that nothing in it can do harm or reach outside, and what a browser makes of it."""

import html
import json
import re
from dataclasses import replace

import pytest
import torch
from test_evaluations import EVALUATION
from test_page import HOSTILE, Tags, assert_closed, data_of, rendered
from torch import nn

import pifa_compile
from pifa_compile import Svd
from pifa_compile.run_page import in_model_order, kinds_of, render_run_page, run_data, same_model
from pifa_compile.store import LayerRecord, Member, Run, RunHeader, evaluations

OBJECT = "0" * 64
HEADER = RunHeader("svd-0.5-0123", "toy", Svd(density=0.5).to_json(), 4, "2025-01-02T03:04:05Z")


def record(name, m=64, n=32, rank=8, **fields):
    numbers = rank * (m + n - rank)
    known = {"form": "pifa", "object": OBJECT, "numbers": numbers, "bytes": 4 * numbers, "seconds": 0.5}
    known |= {"details": {"dtype": "float32"}, "truncation": 0.5, "least_error": 0.25}
    return LayerRecord(name=name, digests={}, shape=(m, n), rank=rank, **known | fields)


def dense(name, m=64, n=32):
    fields = {"form": "dense", "object": None, "numbers": m * n, "bytes": 2 * m * n, "reason": "output embedding"}
    return record(name, m, n, 0, **fields | {"details": {}, "truncation": None, "least_error": None})


LAYERS = (
    dense("lm_head"),
    record("model.layers.0.attn.q+k", 128, members=(Member("model.layers.0.attn.q", {}, 64), Member("x.0.k", {}, 64))),
    record("model.layers.0.mlp.up", rank=4),
    record("model.layers.1.attn.q", details={"dtype": ["float32"]}),
)


@pytest.fixture
def run():
    return Run(HEADER, LAYERS, complete=True)


@pytest.fixture
def measured(store):
    """Two runs of one model, at densities 0.8 and 0.4, both evaluated, and an evaluated one of another model."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    runs = [pifa_compile.compress(model, Svd(density=d, rank_multiple=1), progress=False).run for d in (0.8, 0.4)]
    runs.append(pifa_compile.compress(nn.Sequential(nn.Linear(32, 32)), Svd(density=0.5), progress=False).run)
    for r, perplexity in zip(runs, (14.0, 20.0, 99.0), strict=True):
        figures = {"perplexity": perplexity, "same_top_1": 0.5, "unknown of dense": 3.0}
        known = {"run_id": r.run_id, "density": r.density, "figures": figures}
        store.keep_evaluation(replace(EVALUATION, **known, dense={"perplexity": 13.0, "same_top_1": 1.0}))
    return runs


# --- data ------------------------------------------------------------------------------------------------------------


def test_layers_are_told_in_the_order_of_the_model(run, store):
    layers = run_data(run, store)["layers"]
    assert [layer["name"] for layer in layers] == [r.name for r in (*LAYERS[1:], LAYERS[0])]
    assert [layer["kind"] for layer in layers] == ["q+k", "up", "q", "lm_head"]
    assert [layer["block"] for layer in layers] == [0, 0, 1, None]
    assert [layer["rank"] for layer in layers] == [8, 4, 8, None]
    assert [layer["bytes_before"] for layer in layers] == [4 * 128 * 32, 4 * 64 * 32, None, 2 * 64 * 32]
    assert layers[0]["density"] == 8 * (128 + 32 - 8) / (128 * 32)
    assert layers[0]["members"] == [["model.layers.0.attn.q", 64], ["x.0.k", 64]]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["head", "b.1.q", "b.0.q", "b.0.k"], ["b.0.q", "b.0.k", "b.1.q", "head"]),
        (["encoder.10.a", "encoder.9.a", "decoder.0.a"], ["encoder.9.a", "encoder.10.a", "decoder.0.a"]),
        (["10", "2", "0"], ["0", "2", "10"]),
        (["one", "two"], ["one", "two"]),
    ],
)
def test_the_order_is_that_of_blocks(names, order):
    assert [r.name for r in in_model_order([record(name) for name in names])] == order


@pytest.mark.parametrize(
    "kinds",
    [
        {"m.0.attn.q_proj": "q_proj", "m.1.attn.q_proj": "q_proj", "m.0.mlp.down_proj": "down_proj"},
        {"e.0.attn.out.dense": "attn.out.dense", "e.0.out.dense": "out.dense", "e.0.mid.dense": "mid.dense"},
        {"e.0.self.q": "self.q", "e.0.cross.q": "cross.q", "e.1.self.q": "self.q", "head": "head"},
        {"0": "linear", "2": "linear"},
        {"mlp.0": "mlp", "mlp.2": "mlp"},
        {"a.dense": "a.dense", "b.dense": "b.dense"},
    ],
)
def test_a_kind_is_the_last_part_of_a_name_or_what_tells_it_from_its_neighbours(kinds):
    assert kinds_of(list(kinds)) == kinds


def test_curves_are_of_all_evaluated_runs_of_the_model(measured, store):
    data = run_data(measured[0], store)
    assert [curve["figure"] for curve in data["curves"]] == ["perplexity", "same_top_1"]
    curve = data["curves"][0]
    assert (curve["dense"], curve["less"], curve["text"], curve["dtype"]) == (13.0, True, "a.txt", "float32")
    assert [(p["run"], p["value"], p["own"]) for p in curve["points"]] == [
        (measured[1].run_id, 20.0, False),
        (measured[0].run_id, 14.0, True),
    ]
    assert [p["density"] for p in curve["points"]] == [measured[1].density, measured[0].density]
    assert [p["value"] for p in run_data(measured[2], store)["curves"][0]["points"]] == [99.0]


def test_figures_that_were_measured_otherwise_are_another_curve(measured, store):
    other = replace(EVALUATION, run_id=measured[1].run_id, dtype="bfloat16", figures={"perplexity": 21.0})
    store.keep_evaluation(other)
    curves = [curve for curve in run_data(measured[0], store)["curves"] if curve["figure"] == "perplexity"]
    assert [(c["dtype"], len(c["points"])) for c in curves] == [("float32", 2), ("bfloat16", 1)]


def test_a_damaged_evaluation_is_a_warning_and_the_page_is_made(measured, store):
    (path,) = evaluations.folder(store.root, measured[1].run_id).glob("*.json")
    path.write_text("{")
    with pytest.warns(UserWarning, match="it is not what was written"):
        data = run_data(measured[0], store)
    assert len(data["curves"][0]["points"]) == 1


def test_runs_are_of_one_model_by_the_content_of_its_weights(store):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    runs = [
        pifa_compile.compress(m, Svd(density=0.5), progress=False).run
        for m in (model, model[0], nn.Linear(32, 32), model.to(torch.bfloat16))
    ]
    assert [same_model(runs[0], other) for other in runs] == [True, True, False, True]
    assert same_model(runs[1], runs[0])
    assert not same_model(Run(HEADER, (), complete=False), runs[0])


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside(measured, store):
    assert_closed(render_run_page(run_data(measured[0], store)))


def hostile(store):
    """The data of a run whose every text is hostile."""
    names = [f"{HOSTILE}.{i}.{HOSTILE}" for i in range(3)]
    layers = [record(n, reason=HOSTILE, details={HOSTILE: [HOSTILE, {HOSTILE: 1}]}) for n in names]
    header = replace(HEADER, model=HOSTILE, revision=HOSTILE, recipe={"method": [HOSTILE], HOSTILE: {HOSTILE: HOSTILE}})
    header = replace(header, calibration={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE})
    data = run_data(Run(header, tuple(layers), complete=False), store)
    point = {"run": HOSTILE, "method": HOSTILE, "density": 0.5, "model_density": 0.5, "value": 2.0, "created": HOSTILE}
    curve = {"text": HOSTILE, "protocol": HOSTILE, "dtype": HOSTILE, "figure": HOSTILE, "less": True, "dense": 1.0}
    return data | {"curves": [curve | {"points": [point | {"own": True}]}] * 2}


def test_hostile_text_stays_text(run, store):
    bad = render_run_page(hostile(store))
    assert Tags(bad).tags == Tags(render_run_page(run_data(run, store))).tags
    assert data_of(bad)["run"]["model"] == HOSTILE
    assert "onerror" in bad and "<img" not in bad


def test_runs_without_layers_or_errors_have_a_page(store):
    for layers in ((), (dense("lm_head"),), (record("a", truncation=None, least_error=None, details={}),)):
        data = run_data(Run(HEADER, layers, complete=False), store)
        assert data_of(render_run_page(data)) == data


# --- in a browser ----------------------------------------------------------------------------------------------------

DRIVER = """<script nonce="page">
const told = {}, text = e => e.textContent;
const first = () => [...document.querySelectorAll("tbody tr")].map(tr => text(tr.cells[0]));
const hover = (id, i) => {
  const box = document.querySelectorAll(`#${id} > svg .mark`)[i].getBoundingClientRect();
  const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
  document.querySelector(`#${id} > svg`).dispatchEvent(new PointerEvent("pointermove", at));
  return [document.getElementById("tip").hidden, text(document.getElementById("tip"))];
};
const press = (id, key) => document.querySelector(`#${id} > svg`).dispatchEvent(new KeyboardEvent("keydown", {key}));
told.figures = text(document.getElementById("figures"));
told.order = first();
document.querySelector("[data-column=rank]").click();
told.down = first();
document.querySelector("[data-column=rank]").click();
told.up = first();
told.sorted = document.querySelector("[data-column=rank]").parentNode.getAttribute("aria-sort");
const drawn = ["density", "rank", "error", "sizes", "quality"];
told.marks = drawn.map(id => document.querySelectorAll(`#${id} > svg .mark`).length);
told.hover = hover("error", 1);
told.ringed = document.querySelectorAll(".ring").length;
told.quality = hover("quality", 0);
press("density", "End");
told.end = text(document.getElementById("tip"));
press("density", "Enter");
told.chosen = text(document.querySelector("tr[aria-current=true]").cells[0]);
press("density", "Escape");
told.hidden = document.getElementById("tip").hidden;
document.querySelector("#kinds button").click();
const faint = document.querySelectorAll("#density > svg .mark.faint").length;
told.kind = [first(), faint, text(document.getElementById("found"))];
document.querySelector("#kinds button").click();
document.getElementById("search").value = "MLP";
document.getElementById("search").dispatchEvent(new Event("input"));
told.search = first();
document.body.append(el("pre", {id: "told"}, JSON.stringify(told)));
</script></body>"""


@pytest.mark.slow
def test_a_browser_draws_sorts_searches_and_tells(run, store, tmp_path):
    data = run_data(run, store)
    point = {"run": "svd-0.5", "method": "svd", "density": 0.5, "model_density": 0.6, "value": 20.0, "created": "then"}
    points = [point | {"own": True}, point | {"density": 0.8, "value": 14.0, "own": False}]
    curve = {"text": "a.txt", "protocol": "so", "dtype": "float32", "figure": "perplexity", "less": True, "dense": 13.0}
    data["curves"] = [curve | {"points": points}]
    path = tmp_path / "run.html"
    path.write_text(render_run_page(data).replace("</body>", DRIVER), encoding="utf-8")
    drawn = rendered(path, tmp_path / "browser")
    assert f"<title>{HEADER.run_id}: pifa</title>" in drawn
    (text,) = re.findall(r'<pre id="told">(.*?)</pre>', drawn)
    told = json.loads(html.unescape(text))
    names = [layer["name"] for layer in data["layers"]]
    assert told["order"] == names
    assert "layers replaced4 of 5" in told["figures"] and "factored in2.0 s" in told["figures"]
    assert told["down"] == [names[0], names[2], names[1], names[3]]
    assert (told["up"], told["sorted"]) == ([names[3], names[1], names[0], names[2]], "ascending")
    assert told["marks"] == [4, 3, 3, 4, 2]
    assert told["hover"][0] is False and told["hover"][1].startswith(names[1])
    assert "0.500, 2 times the least" in told["hover"][1] and told["ringed"] == 3 + 1
    assert told["quality"][1].startswith("svd-0.5") and "perplexity20" in told["quality"][1]
    assert told["end"].startswith("lm_head") and told["chosen"] == "lm_head" and told["hidden"] is True
    assert told["kind"] == [[names[0]], 3, "1 of 4"]
    assert told["search"] == [names[1]]


@pytest.mark.slow
def test_a_browser_shows_hostile_text_as_text(store, tmp_path):
    path = tmp_path / "run.html"
    path.write_text(render_run_page(hostile(store)), encoding="utf-8")
    drawn = rendered(path, tmp_path / "browser")
    tags = Tags(drawn).tags
    assert "img" not in {tag for tag, _ in tags} and [tag for tag, _ in tags].count("script") == 2
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert "&lt;img" in drawn and "<title>owned" not in drawn
    assert drawn.count("<tr") == 4
