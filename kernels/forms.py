"""Which form of the same factors runs a layer: a row of the device's table decides, else the cost.

All forms are exact: they multiply the same numbers, and only the order of summing differs.
m = out_features, n = in_features, r = rank, N = number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pifa_compile._torch import autotuner, device_name, dtype_name, tf32_allowed
from pifa_compile.kernels.tile_tables import Table, table_for


@dataclass(frozen=True)
class Call:
    """One layer as a kernel sees it; ``dtype`` is that of the coefficients, ``tokens`` what N is expected to be.

    ``device`` is the name of a CUDA device, None elsewhere.
    """

    device: str | None
    dtype: str
    tokens: int
    m: int
    n: int
    r: int

    @classmethod
    def of_ir(cls, rows: Any, pivot_rows: Any, coefficients: Any, row_order: Any) -> Call:
        """The call that Inductor IR describes; rows is N x n."""
        device, expected = rows.get_device(), autotuner().expected
        r, n = (expected(size) for size in pivot_rows.get_size())
        return cls(
            device=device_name(device) if device.type == "cuda" else None,
            dtype=dtype_name(coefficients.get_dtype()),
            tokens=expected(rows.get_size()[0]),
            m=expected(row_order.get_size()[0]),
            n=n,
            r=r,
        )


#: The templates that a form needs a tile of.
TEMPLATES: dict[str, tuple[str, ...]] = {"gather": (), "tail": ("tail",)}


def form_for(call: Call) -> str:
    """The form for a call."""
    if call.device is None or call.r == call.m:
        return "gather"
    table = table_for(call.device)
    possible = [form for form in TEMPLATES if _has_tiles(table, form, call)]
    named = table.form(call.dtype, call.tokens, call.r / min(call.m, call.n))
    return named if named in possible else by_cost(call, table, possible)


def available(device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    """The forms that have tiles on a device for coefficients of a dtype."""
    if device.type != "cuda":
        return ["gather"]
    table, call = table_for(device_name(device)), Call("", dtype_name(dtype), tokens, 1, 1, 1)
    return [form for form in TEMPLATES if _has_tiles(table, form, call)]


def _has_tiles(table: Table, form: str, call: Call) -> bool:
    return all(table.candidates(template, call.dtype, call.tokens) for template in TEMPLATES[form])


def by_cost(call: Call, table: Table, possible: list[str]) -> str:
    if call.dtype == "float32" and not tf32_allowed():
        return "gather"  # Triton multiplies exact float32 on no matrix unit; the library does as well, but far better
    return "tail" if "tail" in possible else "gather"
