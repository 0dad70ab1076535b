"""What differs between two runs: settings, layers and totals, and whether they are of one model at all."""

import hashlib
import json
import random
from dataclasses import replace

import pytest

from pifa_compile.diff import compare, totals
from pifa_compile.recipes import Svd
from pifa_compile.store import LayerRecord, Member, Run, RunHeader

HEADER = RunHeader("svd-0.5-0123", "toy", Svd(density=0.5).to_json(), 3, "2025-01-02T03:04:05Z")


def digests(content):
    """Of a weight in float32 and of its cast."""
    texts = {dtype: f"{dtype} {content}".encode() for dtype in ("float32", "bfloat16")}
    return {dtype: f"sha256:{hashlib.sha256(text).hexdigest()}" for dtype, text in texts.items()}


def record(name, rank=8, content=None, m=64, n=32, **fields):
    numbers = rank * (m + n - rank)
    known = {"object": f"{rank:064x}", "form": "pifa", "numbers": numbers, "bytes": 4 * numbers, "seconds": 0.5}
    known |= {"digests": digests(content or name), "truncation": 1 / (rank or 1), "error": 1e-7}
    known["least_error"] = known["truncation"]
    return LayerRecord(name=name, shape=(m, n), rank=rank, **known | fields)


def dense(name, **fields):
    known = {"object": None, "form": "dense", "numbers": 64 * 32, "bytes": 4 * 64 * 32, "reason": "too small"}
    return record(name, **{"rank": 0, "truncation": None, "least_error": None, "error": None} | known | fields)


def group(name, parts, rank=8, **fields):
    members = tuple(Member(part, digests(part), 64) for part in parts)
    return record(name, rank, m=64 * len(parts), digests={}, members=members, **fields)


def run(*layers, **fields):
    return Run(replace(HEADER, **fields), layers, complete=True)


BASE = run(record("a"), record("b"), dense("c"))


def names(found):
    return [pair.name for pair in found.layers if not pair.equal]


def test_a_run_and_itself_made_again_are_equal():
    again = [replace(r, seconds=9.0) for r in BASE.layers]
    found = compare(BASE, run(*again, run_id="svd-0.5-other", created="2026-01-01T00:00:00Z"))
    assert found.equal and found.warning is None
    assert "same weights\n\nno difference" in str(found)
    assert (found.to_json()["equal"], found.to_json()["same_weights"]) == (True, True)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"recipe": Svd(density=0.6).to_json()}, {"recipe: density": (0.5, 0.6)}),
        ({"recipe": Svd(density=0.5).to_json() | {"new": None}}, {}),
        ({"recipe": Svd(density=0.5).to_json() | {"new": 1}}, {"recipe: new": (None, 1)}),
        ({"calibration": {"source": "text"}}, {"calibration: source": (None, "text")}),
        ({"revision": "abc", "seed": 3}, {"revision": (None, "abc"), "seed": (0, 3)}),
        ({"versions": {"torch": "2"}}, {"versions: torch": (None, "2")}),
        ({"model": "other"}, {"model": ("toy", "other")}),
    ],
)
def test_settings_are_compared_field_by_field(fields, settings):
    found = compare(BASE, run(*BASE.layers, **fields))
    assert found.settings == settings
    assert found.equal == (not settings)
    assert all(name in str(found) for name in settings)


def test_settings_are_shown_as_json_and_words_as_they_are():
    deep: dict = {}
    for _ in range(20):  # of the levels that a store may have
        deep = {"d": deep}
    recipes = ({"method": "svd", "joint": ["q+k"], "skip": []}, {"method": "mpifa", "joint": None, "skip": deep})
    text = str(compare(*(run(*BASE.layers, recipe=recipe) for recipe in recipes)))
    assert ["recipe:", "method", "svd", "mpifa"] in [line.split() for line in text.splitlines()]
    assert ["recipe:", "joint", '["q+k"]', "none"] in [line.split() for line in text.splitlines()]
    assert '{"d": {"d": ' in text


def test_the_largest_change_comes_first_and_what_is_the_same_is_counted():
    layers = [record("a", 9), record("b", 20), dense("c"), record("d"), record("e", truncation=0.5)]
    before = [record("a"), record("b"), dense("c"), record("d"), record("e")]
    found = compare(run(*before), run(*layers))
    assert names(found) == ["b", "a", "e"]
    text = str(found)
    row = next(line for line in text.splitlines() if line.startswith("b "))
    assert row.split() == ["b", "pifa", "8", "->", "20", "704", "->", "1,520", "+816",
                           *("1.2e-01", "->", "5.0e-02") * 2]  # fmt: skip
    assert "2 layers are the same in both" in text and "\nc " not in text and "\nd " not in text
    assert [row["name"] for row in found.to_json()["layers"]][:3] == ["b", "a", "e"]


def test_a_layer_that_is_dense_in_one_has_its_reason_beside_the_form():
    text = str(compare(BASE, run(dense("a", reason="skipped"), *BASE.layers[1:])))
    row = next(line for line in text.splitlines() if line.startswith("a "))
    assert "pifa -> dense" in row and "8 -> -" in row and "- -> skipped" in row and f"+{64 * 32 - 704:,}" in row


def test_layers_that_one_run_has_together_stand_beside_those_that_are_apart():
    together = run(group("q+k", ["q", "k"], 10), record("v"))
    apart = run(record("q", 6), record("k", 7), record("v"))
    (pair,) = [pair for pair in compare(together, apart).layers if not pair.equal]
    assert pair.name == "q+k" and [r.name for r in pair.b.records] == ["q", "k"]
    assert pair.weights == "same" and pair.to_json()["b"]["rank"] == [6, 7]
    assert "10 -> 6 & 7" in str(compare(together, apart))
    (back,) = [pair for pair in compare(apart, together).layers if not pair.equal]
    assert back.name == "q & k" and back.b.records == pair.a.records


def test_groups_that_overlap_are_one_row():
    a = run(group("q+k", ["q", "k"]), record("v"), record("o"))
    b = run(record("q"), group("k+v", ["k", "v"]), record("o"))
    rows = compare(a, b).layers
    assert sorted(pair.name for pair in rows) == ["o", "q+k & v"]


def test_runs_of_different_models_are_compared_by_name_with_a_warning():
    found = compare(BASE, run(record("a", content="x"), record("b"), dense("c", content="y")))
    assert found.warning == (
        "2 of 3 layers that are called the same have other weights: the runs are of different models, compared by name"
    )
    assert not found.equal and f"warning: {found.warning}" in str(found).splitlines()[2]
    assert {pair.name: pair.weights for pair in found.layers} == {"a": "other", "b": "same", "c": "other"}


def test_weights_of_another_dtype_are_told_as_such():
    half = [replace(r, digests={"bfloat16": r.digests["bfloat16"]}) for r in BASE.layers]
    found = compare(BASE, run(*half))
    assert found.warning == "the weights are the same, but for the dtype of the model that was compressed"
    assert {pair.weights for pair in found.layers} == {"casts"} and not found.to_json()["same_weights"]


def test_a_layer_of_another_name_is_found_by_its_content():
    found = compare(BASE, run(record("model.a", content="a"), *BASE.layers[1:]))
    assert found.only == ((), ()) and found.warning is None
    assert [(p.a.records[0].name, p.b.records[0].name) for p in found.layers if p.name == "a"] == [("a", "model.a")]


def test_layers_of_one_run_only_are_named():
    found = compare(BASE, run(record("a"), record("d"), group("e+f", ["e", "f"])))
    assert found.only == (("b", "c"), ("d", "e", "f"))
    assert "only in A: b, c" in str(found) and "only in B: d, e, f" in str(found)
    nothing = compare(BASE, run(record("z")))
    assert "no layer in common" in nothing.warning and not nothing.equal


def test_an_unfinished_run_differs():
    part = Run(HEADER, BASE.layers[:2], complete=False)
    found = compare(BASE, part)
    assert found.settings == {"finished": (True, False)} and found.only == (("c",), ())
    assert "(unfinished)" in str(found)


def test_every_layer_is_in_one_row_and_the_rows_sum_to_the_totals():
    """On random runs with groups of random neighbours."""
    dice = random.Random(0)
    for _ in range(30):
        a, b = (run(*random_layers(dice)) for _ in range(2))
        found = compare(a, b)
        for side, r, only in (("a", a, found.only[0]), ("b", b, found.only[1])):
            there = [rec.name for pair in found.layers for rec in getattr(pair, side).records]
            assert len(set(there)) == len(there)
            rest = [rec for rec in r.layers if rec.name not in there]
            assert set(only) >= {name for rec in rest for name, _ in rec.layers}
            counted = sum(getattr(pair, side).numbers for pair in found.layers) + sum(rec.numbers for rec in rest)
            assert counted == totals(r)["numbers"] == sum(rec.numbers for rec in r.layers)
        changes = [pair.change for pair in found.layers]
        assert changes == sorted(changes, reverse=True)
        assert json.loads(json.dumps(found.to_json())) == found.to_json()
        assert str(compare(b, a))


def random_layers(dice):
    left = [f"layer{i}" for i in range(12) if dice.random() < 0.9]
    while left:
        count = dice.choice((1, 1, 2, 3))
        part, left = left[:count], left[count:]
        rank = dice.randrange(1, 20)
        yield group("+".join(part), part, rank) if len(part) > 1 else record(part[0], rank)
