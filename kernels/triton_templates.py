"""The Triton templates: their text, their grids, and how tiles become choices of Inductor's.

One file per template in ``templates/``, named as the template. Imported only where Inductor is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pifa_compile._torch import autotuner, tf32_allowed
from pifa_compile.kernels.tile_tables import Tile

log = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("templates")


def _tail_grid(tokens: Any, m: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """GEMM tiles of y_np, then copy tiles of y_p; ``meta["RANK"]`` of the m columns are copied."""
    columns = cdiv(m - meta["RANK"], meta["BLOCK_N"]) + cdiv(meta["RANK"], meta["BLOCK_N"])
    return cdiv(tokens, meta["BLOCK_M"]) * columns, 1, 1


def _relay_grid(tokens: Any, m: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """Parts of rows of y_p, then tiles of Y."""
    rows = cdiv(meta["RANK"], meta["BLOCK_R"]) * meta["SPLIT"]
    columns = cdiv(m - meta["RANK"], meta["BLOCK_N"]) + cdiv(meta["RANK"], meta["BLOCK_N"])
    return rows + columns, 1, 1


def _few_grid(tokens: Any, features: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """The tiles of all layers, which each take BLOCK_M tokens."""
    return cdiv(tokens, meta["BLOCK_M"]) * meta["TILES"], 1, 1


def _tail_tma_grid(tokens: Any, m: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> tuple[Any, int, int]:
    """At most as many programs as the device has processors, each of which takes tile after tile."""
    return min(_tail_grid(tokens, m, meta, cdiv=cdiv)[0], meta["PROGRAMS"]), 1, 1


GRIDS: dict[str, Callable[..., tuple[Any, int, int]]] = {
    "few_head": _few_grid,
    "few_tail": _few_grid,
    "relay": _relay_grid,
    "tail": _tail_grid,
    "tail_tma": _tail_tma_grid,
}


def settings(tile: Tile, **own: Any) -> dict[str, Any]:
    """What a template is rendered with: the tile's constants, those that all templates read, and its own."""
    return {
        **tile.constants,
        "EARLY": tile.early,
        "ACC_TYPE": "tl.float32",
        "ALLOW_TF32": tf32_allowed(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **own,
    }


def source(name: str) -> str:
    """The text of a template."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def template(name: str) -> Any:
    """Inductor's object for a template; its name is global in a process, so it is made once."""
    return autotuner().template(f"pifa_{name}", GRIDS[name], source(name))


def rendered(
    tiles: Sequence[Tile],
    inputs: list[Any],
    layout: Any,
    own: Callable[[Tile], dict[str, Any]],
    given: list[Any] | None = None,
) -> list[Any]:
    """The tiles as choices of one launch: all that can be rendered if choices are measured, else the first of them.

    own    the settings of a tile
    given  what an early tile reads before it waits for the kernel ahead; None: no tile is launched early
    """
    auto = autotuner()
    choices: list[Any] = []
    for tile in tiles:
        early = given if tile.early else None
        problem = auto.add(choices, template(tile.template), inputs, layout, early=early, **own(tile))
        if problem is not None:
            log.debug("%s: %s", tile, problem)
        elif not auto.measures():
            break  # the table decides
    return choices


def some_order(row_order: Any, rank: int, aligned: int = 1) -> Tensor:
    """A row order for a measurement, spread as real ones are: the pivots and the other rows in ascending order each.

    Uninitialised numbers would all store to few columns, or out of bounds; a plain permutation, farther apart.
    """
    numbers = autotuner().numbers(row_order)
    groups = torch.randperm(numbers.shape[0] // aligned, device=numbers.device)
    order = (aligned * groups[:, None] + torch.arange(aligned, device=numbers.device)).flatten()
    return torch.cat([order[:rank].sort().values, order[rank:].sort().values]).to(numbers.dtype)
