"""Which form of the same factors runs a layer: a row of the device's table decides, else the cost.

All forms are exact: they multiply the same numbers, and only the order of summing differs.
m = out_features, n = in_features, r = rank, N = number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pifa_compile._torch import autotuner, device_name, dtype_name, tf32_allowed
from pifa_compile.cost import fastest
from pifa_compile.kernels import few, tail
from pifa_compile.kernels.tile_tables import Table, table_for


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


#: The kernels of ours that a form launches, each as the templates of which one makes it.
KERNELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gather": (),
    "tail": (tail.TEMPLATES,),
    "few": ((few.HEAD,), (few.TAIL,)),
    "relay": (("relay",),),
}

#: Forms that the cost may choose; the others are chosen by a measured row alone. The pair [I; C] P is no form here: it
#: multiplies r^2 numbers more than the tail in as many launches, and cannot win by arithmetic.
BY_COST = ("tail", "gather")

#: Forms whose tiles hold all tokens at once, and so no more than they were made for.
FEW = ("relay",)


def form_for(call: Call) -> str:
    """The form for a call: what a row of the device's table names, else the cheapest of BY_COST at full speed."""
    if call.device is None or call.r == call.m or not call.fixed:
        return "gather"
    table = table_for(call.device)
    possible = [form for form in KERNELS if _has_tiles(table, form, call) and not (call.dynamic and form in FEW)]
    named = table.form(call.dtype, call.tokens, call.r / min(call.m, call.n))
    if named in possible:
        return named
    if call.dtype == "float32" and not tf32_allowed():
        return "gather"  # Triton multiplies exact float32 on no matrix unit; the library does as well, but far better
    kind = "tfloat32" if call.dtype == "float32" else call.dtype
    by_cost = [form for form in BY_COST if form in possible]
    return fastest(by_cost, call.tokens, call.m, call.n, call.r, kind, table.rates.profile(call.device))


def available(device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    """The forms that have tiles on a device for coefficients of a dtype."""
    if device.type != "cuda":
        return ["gather"]
    table, call = table_for(device_name(device)), Call("", dtype_name(dtype), tokens, 1, 1, 1)
    return [form for form in KERNELS if _has_tiles(table, form, call)]


def _has_tiles(table: Table, form: str, call: Call) -> bool:
    return all(table.candidates(templates, call.dtype, call.tokens) for templates in KERNELS[form])
