"""A card's table from measurements: what is kept of it, in which order, and why."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pifa_compile.kernels import tile_tables
from pifa_compile.kernels.tail import TEMPLATES
from pifa_compile.kernels.tile_tables import EARLY, Span, Table, Tile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu import layers, settle, tiles  # noqa: E402
from bench.gpu.cases import Case  # noqa: E402

SHIPPED = tile_tables.read(tile_tables.FOLDER / "nvidia-h200.json")
MANY = Span(("float16", "bfloat16"), 65, None)
ABOUT = {
    "card": "Abacus 3000",
    "torch": "2.13.0",
    "TB/s": 4.0,
    "TFLOP/s": {"float16": 800.0, "bfloat16": 790.0, "float32": 400.0},
    "launch us": 1.5,
}


def tile(template="tail", block=128, early=False, span=MANY):
    return Tile(template, span, {"BLOCK_M": block, "BLOCK_N": block}, 4, 3, "a guess", early)


def table_of(*given, untried=()):
    return replace(SHIPPED, tiles=given, untried=untried)


def row(of, us, m=4096, ok=True, launch="tail", **more):
    about = {"m": m, "n": 4096, "r": 1360, "together": 1, "N": 2048, "dtype": "bfloat16", "launch": launch}
    return {"way": tiles.words(of), "tile": of.to_json(), "us": us, "ok": ok, "error": 0.5 * (not ok)} | about | more


def test_tiles_come_in_the_order_of_their_time_over_all_layers():
    large, small, tma = tile(), tile(block=64), tile("tail_tma")
    rows = [row(large, 10.0), row(small, 12.0), row(tma, 11.0)]
    rows += [row(large, 90.0, m=11008), row(small, 50.0, m=11008), row(tma, 51.0, m=11008)]
    settled = settle.by_tiles(table_of(large, small, tma, untried=("tail_tma",)), rows, "Abacus 3000")
    # relative to the fastest: 1, 1.8; 1.2, 1; 1.1, 1.02
    assert [t.template for t in settled.table.tiles] == ["tail_tma", "tail", "tail"]
    assert [t.constants["BLOCK_M"] for t in settled.table.tiles] == [128, 64, 128]
    assert settled.removed == () and settled.table.untried == ()
    assert settled.table.tiles[0].reason == (
        "Abacus 3000, bfloat16: 11008x4096, r = 1360, N = 2048: 51.0 us, 1.02 of the fastest; "
        "4096x4096, r = 1360, N = 2048: 11.0 us, 1.10 of the fastest"
    )


def test_what_never_was_the_fastest_goes_and_is_told():
    fast, near, slow = tile(), tile(block=64), tile(block=32)
    rows = [row(fast, 10.0), row(near, 10.1), row(slow, 10.3), row(slow, 20.0, m=11008), row(fast, 19.0, m=11008)]
    settled = settle.by_tiles(table_of(slow, near, fast), rows, "Abacus 3000")
    assert [t.constants["BLOCK_M"] for t in settled.table.tiles] == [128, 64]
    (told,) = settled.removed
    assert told.startswith(tiles.words(slow)) and "4096x4096, r = 1360, N = 2048: 10.3 us, 1.03 of the fastest" in told


def test_what_was_wrong_goes_however_fast_it_was_and_its_template_stays_untried():
    right, wrong = tile(), tile("tail_tma")
    rows = [row(right, 10.0), row(wrong, 1.0, ok=False), row(wrong, 5.0, m=11008), row(right, 20.0, m=11008)]
    settled = settle.by_tiles(table_of(wrong, right, untried=("tail_tma", "relay")), rows, "Abacus 3000")
    assert [t.template for t in settled.table.tiles] == ["tail"]
    assert settled.table.untried == ("tail_tma", "relay")
    assert settled.removed == (f"{tiles.words(wrong)}, N = 2048: an error of 0.5",)
    assert settled.table.tiles[0].reason.count("1.00 of the fastest") == 2  # a wrong one competes with nobody


def test_what_could_not_be_measured_stays_as_it_was_and_untried():
    right, failed = tile(), tile("tail_tma")
    problem = {key: value for key, value in row(failed, 0).items() if key not in ("us", "error")}
    rows = [row(right, 10.0), problem | {"ok": False, "problem": "CUDA error: an illegal memory access"}]
    settled = settle.by_tiles(table_of(failed, right, untried=("tail_tma",)), rows, "Abacus 3000")
    assert settled.removed == () and settled.table.untried == ("tail_tma",)
    assert settled.table.tiles[1] == failed


def test_early_tiles_are_tried_together_and_apart_from_their_template():
    span = Span(("bfloat16",), 1, 2)
    late, early = tile("few_tail", span=span), tile("few_tail", early=True, span=span)
    given = table_of(early, late, untried=(EARLY, "relay"))
    rows = [row(early, 5.0, launch="few_tail"), row(late, 6.0, launch="few_tail")]
    settled = settle.by_tiles(given, rows, "Abacus 3000")
    assert settled.table.tiles[0].early and settled.table.untried == ("relay",)
    assert settled.table.tiles[1] == replace(late, reason=settled.table.tiles[1].reason)  # for where none is
    late_only = settle.by_tiles(given, rows[1:], "Abacus 3000")
    assert [t.early for t in late_only.table.tiles] == [False, True] and late_only.table.untried == (EARLY, "relay")


def test_what_was_not_measured_stays_behind_what_was():
    given = table_of(tile(block=32, span=Span(("float32",), 1, None)), tile(block=64), tile())
    settled = settle.by_tiles(given, [row(given.tiles[2], 10.0)], "Abacus 3000")
    assert settled.table.tiles[1:] == given.tiles[:2]
    assert settle.by_tiles(SHIPPED, [], "Abacus 3000").table == SHIPPED


def block(form, tokens, ms, ok=True):
    found = {"model": "a block", "dtype": "bfloat16", "tokens": tokens, "ms": ms, "ok": ok}
    return found | ({"form": form} if form else {})


def test_the_form_of_a_block_holds_as_far_as_the_next_count_that_was_measured():
    rows = [block("tail", 2048, 3.0), block("gather", 2048, 2.5), block(None, 2048, 1.0)]
    rows += [block("tail", 1, 0.07), block("few", 1, 0.06), block("relay", 1, 0.01, ok=False)]
    rows += [block("few", 16, 0.0895), block("tail", 16, 0.09)]  # as good as what the cost prefers
    table = settle.by_forms(SHIPPED, rows, "Abacus 3000")
    found = [(form.form, form.span.first, form.span.last) for form in table.forms]
    assert found == [("few", 1, 4), ("tail", 5, 181), ("gather", 182, None)]
    assert table.forms[2].reason.endswith("bfloat16, a block, N = 2048: gather 2.500 ms, tail 3.000 ms")
    assert table.form("float16", 3, 0.4) == "few" and table.form("bfloat16", 10**6, 1.0) == "gather"
    assert settle.by_forms(SHIPPED, [block(None, 1, 1.0)], "Abacus 3000") == SHIPPED


def test_a_card_without_a_table_gets_one_of_its_own_with_the_rates_that_it_reached():
    table = settle.settle(tile_tables.read(tile_tables.FOLDER / "safe.json"), ABOUT, {"tiles": [{"ok": False}]}).table
    assert table.device == "Abacus 3000" and table.tiles == tile_tables.read(tile_tables.FOLDER / "safe.json").tiles
    assert table.rates.bytes_per_second == 4e12 and table.rates.flop_per_second["bfloat16"] == 7.9e14


@pytest.fixture
def measured(monkeypatch):
    """Rows of the shipped table's contests with times of this test's making, as a card would give them."""
    seen = []

    def measure(way, case, tokens, dtype, device, roof):
        table = tile_tables.table_for("NVIDIA H200")
        first = {name: table.candidates([name], "bfloat16", tokens)[:1] for name in (*TEMPLATES, "few_head", "relay")}
        seen.append((way.name, first))
        return case.named() | {"N": tokens, "dtype": "bfloat16", "us": float(len(seen)), "ok": True, "error": 1e-3}

    monkeypatch.setattr(layers, "measure", measure)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *a: "NVIDIA H200")
    monkeypatch.setattr("pifa_compile.kernels.kernel_forms.device_name", lambda device: "NVIDIA H200")
    case = Case("Llama-2-7B", "q, k, v, o", 4096, 4096, 1360)
    found = []
    for tokens, together in ((2048, 1), (1, 3), (1, 1), (16, 2), (16, 1)):
        found += tiles.rows(case, together, tokens, layers.torch.bfloat16, "cuda", None)
    return found, seen


def test_every_tile_for_a_call_is_measured_by_itself_and_once(measured):
    rows, seen = measured
    for tokens, together in {(row["N"], row["together"]) for row in rows}:
        own = [json.dumps(row["tile"]) for row in rows if (row["N"], row["together"]) == (tokens, together)]
        templates = ("few_head", "few_tail") if together > 1 else (*TEMPLATES, "few_head", "relay")
        tried = replace(SHIPPED, untried=()).candidates(templates, "bfloat16", tokens)
        assert sorted(own) == sorted(json.dumps(tile.to_json()) for tile in tried)
    for row, (_, first) in zip(rows, seen, strict=True):
        (taken,) = first[row["tile"]["template"]]
        assert taken.to_json() == row["tile"]
    assert {name for name, _ in seen} == {"siblings", "pifa tail", "pifa few", "pifa relay"}


def test_a_run_on_the_shipped_table_settles_it_into_one_that_serves_every_call(measured, tmp_path):
    rows, _ = measured
    data = {"about": ABOUT | {"card": "NVIDIA H200"}, "sections": {"tiles": rows, "blocks": [block("few", 1, 1.0)]}}
    (tmp_path / "rows.json").write_text(json.dumps(data))
    command = [sys.executable, "-m", "bench.gpu.settle", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (tmp_path / "table.json").write_text(done.stdout)
    table = tile_tables.read(tmp_path / "table.json")
    assert isinstance(table, Table) and table.untried == () and table.forms[0].form == "few"
    assert len(table.tiles) + len(done.stderr.splitlines()) == len(SHIPPED.tiles)
    for dtype in ("float16", "bfloat16", "float32"):
        for tokens in (1, 2, 16, 17, 64, 65, 1024, 100_000):
            assert table.candidates(TEMPLATES, dtype, tokens), (dtype, tokens)
    assert table.rates.flop_per_second["tfloat32"] == 4e14 and table.rates.launch_seconds == 1.5e-6
    assert table.rates.flop_per_second["float32"] == SHIPPED.rates.flop_per_second["float32"]
