"""The relay: all of ``pifa::linear`` for few tokens in one launch whose second phase waits on counters of the first.

No default: whether it is right and fast can only be told on a card. A row of a table names it, once it was tried there.
m = out_features, n = in_features, r = rank, N = tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from pifa_compile._torch import autotuner, device_name, dtype_name, inductor
from pifa_compile.kernels.tile_tables import Tile, table_for
from pifa_compile.kernels.triton_templates import rendered, settings

#: Tickets drawn, tiles of the first phase done, programs done; all zero between launches.
COUNTERS = 3


def lower(x: Any, pivot_rows: Any, coefficients: Any, row_order: Any, y_scale: float, aligned: int) -> Any:
    """Inductor IR of Y (N x m) from x (N x n)."""
    auto = autotuner()
    inputs = auto.realize(x, pivot_rows, coefficients, row_order, _counters(x.get_device()))
    tokens, r = x.get_size()[0], int(pivot_rows.get_size()[0])
    layout = auto.layout(x, [tokens, row_order.get_size()[0]], x.get_dtype())
    table = table_for(device_name(x.get_device()))
    tiles = table.candidates(["relay"], dtype_name(coefficients.get_dtype()), auto.expected(tokens))

    def own(tile: Tile) -> dict[str, Any]:
        partial_sums = auto.workspace(x.get_device(), tile.constants["SPLIT"] * tokens * r, torch.float32)
        return settings(tile, RANK=r, Y_SCALE=y_scale, workspace_arg=partial_sums)

    # Measuring would need counters that are zero before each run; the first tile that renders is taken.
    choices = rendered(tiles, inputs, layout, own)[:1]
    return auto.choose("pifa_relay", choices, inputs, layout, {})


def _counters(device: torch.device) -> Any:
    """IR of the counters of a graph: one buffer for all its layers, which run one after the other and leave zeros."""

    def make() -> Any:
        call = inductor().call
        zeros = call(torch.ops.aten.full, [COUNTERS], 0, dtype=torch.int32, device=device)
        zeros.realize()
        return zeros

    return autotuner().once_per_graph(f"pifa_counters_{device}", make)
