"""The tile tables of the package, and which of their tiles this version of torch can render."""

from __future__ import annotations

from collections.abc import Collection

from pifa_compile._torch import autotuner
from pifa_compile.kernels import tile_tables

TABLES = {path.stem: tile_tables.read(path) for path in sorted(tile_tables.FOLDER.glob("*.json"))}
LAUNCHES_EARLY = autotuner().launches_early()


def tiles_of(templates: Collection[str]) -> list[tuple[str, tile_tables.Tile]]:
    """The tiles of some templates in all tables, each with the name of its table."""
    found = [(name, tile) for name, table in TABLES.items() for tile in table.tiles if tile.template in templates]
    return [(name, tile) for name, tile in found if LAUNCHES_EARLY or not tile.early]


def ids(tiles: list[tuple[str, tile_tables.Tile]]) -> list[str]:
    """Their names as parameters of a test."""
    return [f"{name}-{t.template}-{'x'.join(map(str, t.constants.values()))}-{t.span.dtypes[0]}" for name, t in tiles]
