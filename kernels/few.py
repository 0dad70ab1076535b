"""On CUDA, few tokens: two kernels that read once the weights of a layer, or of several that read the same tokens.

    head   y_p = x @ P.T of all layers, side by side
    tail   Y of all layers, side by side, from it (as ``tail.py``)

Programs of one launch pick the layer that they work for, so factors stay where they are. With few tokens a layer is one
read of its weights, and a launch costs as much as many kilobytes of them. m = out_features, n = in_features, r = rank,
N = number of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pifa_compile._torch import autotuner, device_name, dtype_name
from pifa_compile.kernels.tile_tables import Tile, table_for
from pifa_compile.kernels.triton_templates import rendered, settings, some_order

HEAD, TAIL = "few_head", "few_tail"


def lower(
    rows: Any, pivot_rows: Sequence[Any], coefficients: Sequence[Any], row_orders: Sequence[Any], y_scale: float = 1.0
) -> Any:
    """Inductor IR of Y (N x (m_1 + m_2 + ...)) from rows (N x n); raises ValueError where no tile can be rendered.

    y_scale  what y_p is multiplied with before it is rounded to the dtype of the coefficients
    """
    y_p = _head(rows, pivot_rows, coefficients[0].get_dtype(), y_scale)
    auto = autotuner()
    inputs = auto.realize(y_p, *coefficients, *row_orders)
    layout = auto.layout(inputs[0], [rows.get_size()[0], sum(_sizes(row_orders))], rows.get_dtype())

    def own(tile: Tile) -> dict[str, Any]:
        return tail_settings(tile, coefficients, 1 / y_scale)

    choices = _choices(TAIL, coefficients[0], inputs, layout, own, given=inputs[1:])
    ranks = _sizes(pivot_rows)
    make = {1 + len(ranks) + i: functools.partial(some_order, rank=rank) for i, rank in enumerate(ranks)}
    return auto.choose(f"pifa_{TAIL}", choices, inputs, layout, make)


def _head(rows: Any, pivot_rows: Sequence[Any], dtype: torch.dtype, scale: float) -> Any:
    """IR of y_p of all layers (N x (r_1 + r_2 + ...)) in ``dtype``, scaled."""
    auto = autotuner()
    inputs = auto.realize(rows, *pivot_rows)
    ranks = _sizes(pivot_rows)
    layout = auto.layout(inputs[0], [rows.get_size()[0], sum(ranks)], dtype)

    def own(tile: Tile) -> dict[str, Any]:
        count = _blocks(ranks, tile)
        return settings(tile, LAYERS=len(ranks), TILES=count, SCALE=scale)

    # A head may be the first kernel of a program, right behind one that has changed the weights: never early.
    choices = _choices(HEAD, pivot_rows[0], inputs, layout, own)
    return auto.choose(f"pifa_{HEAD}", choices, inputs, layout, {})


def tail_settings(tile: Tile, coefficients: Sequence[Any], out_scale: float) -> dict[str, Any]:
    """What the tail is rendered with."""
    ranks = [int(c.get_size()[1]) for c in coefficients]
    count = _blocks(ranks, tile) + _blocks(_sizes(coefficients), tile)
    return settings(tile, LAYERS=len(ranks), TILES=count, OUT_SCALE=out_scale)


def _choices(
    template: str,
    factors: Any,
    inputs: list[Any],
    layout: Any,
    own: Callable[[Tile], dict[str, Any]],
    given: list[Any] | None = None,
) -> list[Any]:
    """The tiles of a template for inputs that begin with one row per token; raises ValueError where none serves."""
    tokens, dtype = inputs[0].get_size()[0], factors.get_dtype()
    table = table_for(device_name(inputs[0].get_device()))
    tiles = table.candidates([template], dtype_name(dtype), autotuner().expected(tokens))
    choices = rendered(tiles, inputs, layout, own, given)
    if not choices:
        raise ValueError(f"no tile of {template} for {dtype} and {tokens} tokens")
    return choices


def _sizes(matrices: Sequence[Any]) -> list[int]:
    """How many rows each has."""
    return [int(matrix.get_size()[0]) for matrix in matrices]


def _blocks(sizes: list[int], tile: Tile) -> int:
    """How many programs they take, of BLOCK_N rows each."""
    return sum(-(-size // tile.constants["BLOCK_N"]) for size in sizes)
