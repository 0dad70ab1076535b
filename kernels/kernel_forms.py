"""Which form of the same factors runs a layer: a row of the device's table decides, else the cost.

All forms are exact: they multiply the same numbers, and only the order of summing differs.
m = out_features, n = in_features, r = rank, N = number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pifa_compile._torch import autotuner, device_name, dtype_name, tf32_allowed
from pifa_compile.kernels.tile_tables import Rates, Table, table_for


@dataclass(frozen=True)
class Call:
    """One layer as a kernel sees it; ``dtype`` is that of the coefficients.

    ``device`` is the name of a CUDA device, None elsewhere. ``dynamic`` says that N may be another than ``tokens`` in
    later calls of the same code; ``fixed``, that m, n and r are numbers.
    """

    device: str | None
    dtype: str
    tokens: int
    m: int
    n: int
    r: int
    dynamic: bool = False
    fixed: bool = True

    @classmethod
    def of_ir(cls, rows: Any, pivot_rows: Any, coefficients: Any, row_order: Any) -> Call:
        """The call that Inductor IR describes; rows is N x n."""
        device, auto = rows.get_device(), autotuner()
        tokens, sizes = rows.get_size()[0], (*row_order.get_size(), *pivot_rows.get_size())
        m, r, n = (auto.expected(size) for size in sizes)
        return cls(
            device=device_name(device) if device.type == "cuda" else None,
            dtype=dtype_name(coefficients.get_dtype()),
            tokens=auto.expected(tokens),
            m=m,
            n=n,
            r=r,
            dynamic=not auto.is_number(tokens),
            fixed=all(auto.is_number(size) for size in sizes),
        )


#: The templates of a form, of which it needs a tile.
TEMPLATES: dict[str, tuple[str, ...]] = {"gather": (), "tail": ("tail", "tail_gemv", "tail_tma"), "relay": ("relay",)}

#: Forms that the cost may choose; a relay is chosen by a measured row alone. The pair [I; C] P is no form here: it
#: multiplies r^2 numbers more than the tail in as many launches, and cannot win by arithmetic.
BY_COST = ("tail", "gather")

#: Forms whose tiles hold all tokens at once, and so no more than they were made for.
FEW = ("relay",)

Cost = Callable[[str, Call, Rates], float]


def roofline(form: str, call: Call, rates: Rates) -> float:
    """Seconds of a form if every launch moved its bytes, or did its operations, as fast as the device can at most."""
    size = 4 if call.dtype == "float32" else 2
    kind = "tfloat32" if call.dtype == "float32" and tf32_allowed() else call.dtype
    tokens, m, n, r = call.tokens, call.m, call.n, call.r

    def launch(numbers: int, flop: int = 0) -> float:
        work = max(numbers * size / rates.bytes_per_second, flop / rates.flop_per_second[kind])
        return rates.launch_seconds + work

    head = launch(tokens * (n + r) + r * n, 2 * tokens * r * n)
    if form == "tail":
        return head + launch(tokens * (r + m) + (m - r) * r, 2 * tokens * (m - r) * r)
    product = launch(tokens * m + (m - r) * r, 2 * tokens * (m - r) * r)
    positions = 2 * launch(2 * m)
    return head + product + positions + launch(2 * tokens * m)


def form_for(call: Call, cost: Cost = roofline) -> str:
    """The form for a call: what a row of the device's table names, else the cheapest of BY_COST."""
    if call.device is None or call.r == call.m or not call.fixed:
        return "gather"
    table = table_for(call.device)
    possible = [form for form in TEMPLATES if _has_tiles(table, form, call) and not (call.dynamic and form in FEW)]
    named = table.form(call.dtype, call.tokens, call.r / min(call.m, call.n))
    if named in possible:
        return named
    if call.dtype == "float32" and not tf32_allowed():
        return "gather"  # Triton multiplies exact float32 on no matrix unit; the library does as well, but far better
    return min((form for form in BY_COST if form in possible), key=lambda form: cost(form, call, table.rates))


def available(device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    """The forms that have tiles on a device for coefficients of a dtype."""
    if device.type != "cuda":
        return ["gather"]
    table, call = table_for(device_name(device)), Call("", dtype_name(dtype), tokens, 1, 1, 1)
    return [form for form in TEMPLATES if _has_tiles(table, form, call)]


def _has_tiles(table: Table, form: str, call: Call) -> bool:
    templates = TEMPLATES[form]
    return not templates or any(table.candidates(name, call.dtype, call.tokens) for name in templates)
