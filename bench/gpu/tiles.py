"""Every tile of the card's table by itself: one layer, or several that read the same few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu import layers
from bench.gpu.cases import Case, exact, random_factors
from bench.gpu.layers import Row, Way
from bench.gpu.roof import Roof
from bench.gpu.timing import inductor
from pifa_compile.kernels import kernel_forms, lowering, tail, tile_tables
from pifa_compile.kernels.siblings import siblings
from pifa_compile.kernels.tile_tables import Table, Tile
from pifa_compile.kernels.triton_templates import rendered


@dataclass(frozen=True)
class Contest:
    """The tiles that compete for one launch of a form."""

    form: str
    launch: tuple[str, ...]
    tiles: tuple[Tile, ...]


def contests(table: Table, together: int, tokens: int, dtype: str) -> Iterator[Contest]:
    """What is to be measured for ``together`` layers that read the same tokens; every tile once, in a form of two
    launches where it is in one: there it meets the other half, which may let it start early."""
    kernels = {"few": kernel_forms.KERNELS["few"]} if together > 1 else kernel_forms.KERNELS
    seen: list[Tile] = []
    for form in sorted(kernels, key=lambda form: (-len(kernels[form]), form)):
        for launch in kernels[form]:
            tiles = tuple(tile for tile in table.candidates(launch, dtype, tokens) if tile not in seen)
            seen += tiles
            if tiles:
                yield Contest(form, launch, tiles)


def rows(case: Case, together: int, tokens: int, dtype: torch.dtype, device: str, roof: Roof) -> list[Row]:
    """A row per tile; where a form has two launches, the other one keeps the first of its tiles."""
    if device == "cpu":
        return []
    name = str(dtype).removeprefix("torch.")
    found = []
    with layers.all_templates(device, early=tile_tables.EARLY not in layers.EXCLUDED):
        table = tile_tables.table_for(torch.cuda.get_device_name())
    for contest in contests(table, together, tokens, name):
        for tile in contest.tiles:
            others = [t for t in table.tiles if t.template not in contest.launch]
            with tile_tables.use_table(replace(table, tiles=(tile, *others))), no_substitute():
                way = _way(contest.form, case, together, tokens, dtype, device)
                row = layers.measure(way, case, tokens, dtype, device, roof)
            about = {"way": words(tile), "together": together, "launch": contest.launch[0]}
            found.append(row | about | {"tile": tile.to_json()})
    return found


@contextmanager
def no_substitute() -> Iterator[None]:
    """Have a tile that cannot be rendered be an error, where a kernel of a library would take its place."""

    def strictly(*given: Any, **named: Any) -> list[Any]:
        choices = rendered(*given, **named)
        if not choices:
            raise ValueError("the tile cannot be rendered")
        return choices

    with mock.patch.object(tail, "rendered", strictly):
        yield


def words(tile: Tile) -> str:
    """A tile in one line."""
    constants = "x".join(str(v) for v in tile.constants.values())
    early = ", early" if tile.early else ""
    return f"{tile.template} {constants}, {tile.warps} warps, {tile.stages} stages{early}"


def _way(form: str, case: Case, together: int, tokens: int, dtype: torch.dtype, device: str) -> Way:
    if together > 1:
        return _together(case, together, tokens, dtype, device)
    (way,) = (w for w in layers.ways(case, tokens, dtype, device) if w.name == f"pifa {form}")
    return way


def _together(case: Case, together: int, tokens: int, dtype: torch.dtype, device: str) -> Way:
    """Layers that read the same tokens as one operator."""
    lowering.register()
    compiled = torch.compile(lambda *a: siblings(*a), backend=inductor(device), fullgraph=True, dynamic=False)

    def make(count: int) -> tuple[list[Callable[[], Tensor]], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        sets = [[random_factors(case, dtype, device) for _ in range(together)] for _ in range(count)]
        given: list[list[Any]] = [
            [[f.pivot_rows for f in own], [f.coefficients for f in own], [f.row_order for f in own]] for own in sets
        ]
        inputs = [torch.randn(tokens, case.n, device=device).to(dtype) for _ in range(count)]
        calls = [lambda x=x, g=g: compiled(x, *g) for x, g in zip(inputs, given, strict=True)]
        run = lambda x: compiled(x, *given[0])  # noqa: E731
        return calls, run, (lambda x: torch.cat([exact(f, x) for f in sets[0]], 1))

    numbers = together * case.r * (case.m + case.n - case.r)
    return Way("siblings", make, numbers, 2 * numbers, layers=together)
