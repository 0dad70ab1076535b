"""The Triton templates: their text, their grids, and how one becomes a choice of Inductor's.

One file per template in ``templates/``, named as the template. Imported only where Inductor is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pifa_compile._torch import autotuner, tf32_allowed
from pifa_compile.kernels.tile_tables import Tile

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


def _siblings_grid(tokens: Any, features: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, int, int]:
    """The tiles of all layers, which each take BLOCK_M tokens."""
    return cdiv(tokens, meta["BLOCK_M"]) * meta["TILES"], 1, 1


def _tail_tma_grid(tokens: Any, m: Any, meta: dict[str, Any], *, cdiv: Any, min: Any) -> tuple[Any, int, int]:
    """At most as many programs as the device has processors, each of which takes tile after tile."""
    return min(_tail_grid(tokens, m, meta, cdiv=cdiv)[0], meta["PROGRAMS"]), 1, 1


GRIDS: dict[str, Callable[..., tuple[Any, int, int]]] = {
    "relay": _relay_grid,
    "siblings_head": _siblings_grid,
    "siblings_tail": _siblings_grid,
    "tail": _tail_grid,
    "tail_gemv": _tail_grid,
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
