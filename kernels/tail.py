"""The tail: the whole of Y from y_p, in one launch whose epilogue Inductor fuses with what reads Y.

    Y[:, row_order[:r]] = y_p / scale        Y[:, row_order[r:]] = (y_p @ coefficients.T) / scale

Candidates are the tiles of the device's table and, where choices are measured, two index copies around a library GEMM.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pifa_compile._torch import autotuner, device_name, dtype_name, processors
from pifa_compile.kernels import few
from pifa_compile.kernels.tile_tables import Tile, table_for
from pifa_compile.kernels.triton_templates import rendered, settings, some_order

#: The templates, of which a table may hold tiles for any number of tokens.
TEMPLATES = (few.TAIL, "tail", "tail_tma")

#: Takes the names of position in [pivots, others]; see ``lower``.
ROW_ORDER = 2


def register() -> None:
    """Make the library kernel known to compiled programs, which call it by name."""
    autotuner().kernel("pifa_tail_library", tail_by_library)


def lower(
    y_p: Any, coefficients: Any, row_order: Any, dtype: torch.dtype, out_scale: float, aligned: int = 1
) -> Any:
    """Inductor IR of Y (N x m, ``dtype``) from y_p (N x r, the coefficients' dtype, scaled by 1 / ``out_scale``).

    aligned  what ``pifa::linear`` promises of the order; a measurement keeps it
    """
    auto = autotuner()
    inputs = auto.realize(y_p, coefficients, row_order)
    tokens, r = inputs[0].get_size()
    layout = auto.layout(inputs[0], [tokens, row_order.get_size()[0]], dtype)
    table = table_for(device_name(inputs[0].get_device()))
    names = [name for name in TEMPLATES if name != "tail_tma" or _by_tma(inputs[:2])]
    tiles = table.candidates(names, dtype_name(coefficients.get_dtype()), auto.expected(tokens))

    def own(tile: Tile) -> dict[str, Any]:
        if tile.template == few.TAIL:
            return few.tail_settings(tile, [coefficients], out_scale)
        return _settings(tile, inputs[0].get_device(), int(r), out_scale, aligned)

    choices = rendered(tiles, inputs, layout, own, given=inputs[1:])
    if auto.calls_python() and (auto.measures() or not choices):
        kernel = auto.kernel("pifa_tail_library", tail_by_library)
        auto.add_kernel(choices, kernel, inputs, layout, dtype=dtype, out_scale=out_scale)
    make = {ROW_ORDER: functools.partial(some_order, rank=int(r), aligned=aligned)}
    return auto.choose("pifa_tail", choices, inputs, layout, make)


def _by_tma(matrices: list[Any]) -> bool:
    """Whether rows are contiguous and begin at multiples of 16 bytes, and the device is of compute capability 9."""
    major, _ = torch.cuda.get_device_capability(matrices[0].get_device())
    rows = [(x.get_stride(), x.get_dtype().itemsize) for x in matrices]
    return major >= 9 and all(inner == 1 and outer * size % 16 == 0 for (outer, inner), size in rows)


def _settings(tile: Tile, device: torch.device, r: int, out_scale: float, aligned: int) -> dict[str, Any]:
    persistent = {"PROGRAMS": processors(device)} if tile.template == "tail_tma" else {}
    even = r % tile.constants["BLOCK_K"] == 0
    return settings(tile, RANK=r, EVEN_K=even, OUT_SCALE=out_scale, ALIGNED=aligned, **persistent)


def tail_by_library(
    y_p: Tensor, coefficients: Tensor, row_order: Tensor, *, dtype: torch.dtype, out_scale: float
) -> Tensor:
    """The tail by a library GEMM and two index copies."""
    r = y_p.shape[1]
    y = y_p.new_empty(y_p.shape[0], row_order.shape[0], dtype=dtype)
    y_np = y_p @ coefficients.T
    if out_scale != 1.0:
        y_p, y_np = y_p * out_scale, y_np * out_scale
    y[:, row_order[:r]] = y_p.to(dtype)
    y[:, row_order[r:]] = y_np.to(dtype)
    return y
