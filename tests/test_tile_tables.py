"""The shipped tile tables are complete, every row can be reached, and an unknown device is served with one warning."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from pifa_compile.kernels import tail, tile_tables, triton_templates

TABLES = sorted(tile_tables.FOLDER.glob("*.json"))
TOKENS = (1, 2, 16, 17, 64, 65, 1024, 100_000)


@pytest.fixture
def warned():
    tile_tables._warn_once.cache_clear()
    yield
    tile_tables._warn_once.cache_clear()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_serves_every_call_and_gives_its_reasons(path):
    table = tile_tables.read(path)
    for dtype in ("float16", "bfloat16", "float32"):
        for tokens in TOKENS:
            assert table.candidates(tail.TEMPLATES, dtype, tokens), (dtype, tokens)
    for tile in table.tiles:
        assert tile.reason and tile.template in triton_templates.GRIDS
        assert tile.warps in (1, 2, 4, 8) and all(value > 0 for value in tile.constants.values())
    assert len({str(tile) for tile in table.tiles}) == len(table.tiles)
    assert set(table.rates.flop_per_second) == {"float16", "bfloat16", "float32", "tfloat32"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_is_written_as_it_was_read(path):
    assert tile_tables.write(tile_tables.read(path)) == path.read_text()


def test_early_tiles_wait_until_their_device_has_tried_them():
    table = tile_tables.read(tile_tables.FOLDER / "nvidia-h200.json")
    early = {t.template for t in table.tiles if t.early}
    assert early == {"few_head", "few_tail"}
    for template in early:
        tried = replace(table, untried=()).candidates([template], "bfloat16", 2)
        untried = replace(table, untried=(tile_tables.EARLY,)).candidates([template], "bfloat16", 2)
        assert tried[0].early and untried == [t for t in tried if not t.early] != []
        twin = replace(tried[0], early=False, reason="")
        assert twin in [replace(t, reason="") for t in untried]


def test_every_template_has_a_file_a_grid_and_a_row():
    names = {path.stem for path in triton_templates.FOLDER.glob("*.jinja")}
    used = {tile.template for path in TABLES for tile in tile_tables.read(path).tiles}
    assert names == set(triton_templates.GRIDS) == used


def test_the_device_s_own_table_is_found_by_the_name_that_its_driver_reports(caplog, warned):
    assert tile_tables.table_for("NVIDIA H200").device == "NVIDIA H200"
    assert not caplog.records


def test_an_unknown_device_gets_safe_tiles_and_one_warning(caplog, warned):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert tile_tables.table_for("Abacus 3000").device == "any"
    (record,) = caplog.records
    assert "Abacus 3000" in record.message and "nvidia-h200" in record.message and "max_autotune" in record.message


def test_a_forced_table_is_in_force_while_the_context_is():
    safe = tile_tables.read(tile_tables.FOLDER / "safe.json")
    with tile_tables.use_table(safe):
        assert tile_tables.table_for("NVIDIA H200") is safe
    assert tile_tables.table_for("NVIDIA H200") is not safe
