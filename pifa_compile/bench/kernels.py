"""Every form of one layer, at one rank: dense, pair, PIFA, and PIFA with a folded order or an order of groups.

m = out_features, n = in_features, r = rank, N = number of tokens. Weights are random; each form is compared with what
its own factors make of x in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from pifa_compile import _torch, cost
from pifa_compile.bench.report import Report, Row
from pifa_compile.bench.shapes import shapes
from pifa_compile.bench.timing import in_turns
from pifa_compile.factors import Factors, PairFactors, PifaFactors, density_of_rank, rank_for_density
from pifa_compile.modules import factored_module

#: Relative error of the output that rounding alone explains.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: A prediction that is off by more than this factor is flagged.
WRONG = 1.5

COLUMNS = ("layer", "m", "n", "rank", "dtype", "N", "freezing", "form", "ms", "of dense", "of pair", "of roof",
           "ms predicted", "flag", "right")  # fmt: skip


def bench_kernels(
    sets: Sequence[str],
    *,
    density: float | None = None,
    tokens: Sequence[int] = (1, 16, 128, 512),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    freezing: Sequence[bool] = (False, True),
    rounds: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Time every form of every shape of the named sets.

    density  of the rank that pair and PIFA share; None: half of the smaller side
    """
    report = Report(f"forms of one layer at equal rank, medians of {rounds} turns", COLUMNS)
    machine = cost.profile()
    assert machine is not None
    for (name, (m, n)), dtype in product(_named(sets), dtypes):
        r = min(m, n) // 2 if density is None else rank_for_density(m, n, density, 16)
        if r == 0:
            report.notes.append(f"{name}: no rank keeps {density:g} of a {m} x {n} weight")
            continue
        say(f"{name} {m} x {n}, rank {r}, {_torch.dtype_name(dtype)}")
        layers = _layers(m, n, r, dtype)
        for frozen, N in product(freezing, tokens):
            known = {"layer": name, "m": m, "n": n, "rank": r, "dtype": _torch.dtype_name(dtype), "N": N}
            report.rows += _rows(layers, known | {"freezing": frozen}, dtype, machine, rounds)
    wrong = sum(row["flag"] != "" for row in report.rows)
    report.notes.append(f"{wrong} of {len(report.rows)} predictions are wrong by more than {WRONG}")
    return report


def _named(sets: Sequence[str]) -> Iterable[tuple[str, tuple[int, int]]]:
    return [(f"{name}: {layer}", shape) for name in sets for layer, shape in shapes(name).items()]


def _layers(m: int, n: int, r: int, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Tensor, str]]:
    """By form: the layer, the weight that it stands for in float64, and the form of the cost model."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).div_(columns**0.5).to(dtype)

    pivot_rows, coefficients = random(r, n), random(m - r, r)
    free = torch.randperm(m, generator=generator)
    order = torch.cat([free[:r].sort().values, free[r:].sort().values])
    orders = {"pifa": order, "pifa folded": torch.arange(m)}
    if m % 32 == 0 and r % 32 == 0:
        groups = torch.cat([part.sort().values for part in torch.randperm(m // 32, generator=generator).split(r // 32)])
        orders["pifa groups"] = (groups[:, None] * 32 + torch.arange(32)).flatten()
    found: dict[str, Factors] = {"pair": PairFactors(random(m, r), pivot_rows)}
    found |= {name: PifaFactors(pivot_rows, coefficients, rows.to(torch.int32)) for name, rows in orders.items()}
    dense = nn.Linear(n, m, bias=False, dtype=dtype).requires_grad_(False)
    layers: dict[str, tuple[nn.Module, Tensor, str]] = {"dense": (dense, dense.weight.double(), "dense")}
    for name, factors in found.items():
        form = "pifa folded" if name == "pifa groups" else name
        layers[name] = factored_module(factors, None), factors.weight(), form
    return layers


def _rows(
    layers: dict[str, tuple[nn.Module, Tensor, str]], known: Row, dtype: torch.dtype, machine: cost.Profile, rounds: int
) -> list[Row]:
    m, n, r, N = (known[key] for key in ("m", "n", "rank", "N"))
    x = torch.randn(N, n, generator=torch.Generator().manual_seed(1)).to(dtype)
    runs, errors = {}, {}
    torch.compiler.reset()
    with torch.no_grad(), _torch.freezing(known["freezing"]):
        for name, (layer, weight, _) in layers.items():
            compiled = torch.compile(_torch.own_frame(layer), backend="inductor" if name == "dense" else "pifa")
            wanted = x.double() @ weight.T
            errors[name] = float((compiled(x).double() - wanted).norm() / wanted.norm())
            runs[name] = functools.partial(compiled, x)
        taken = in_turns(runs, rounds=rounds)
    rows = []
    for name, (_, _, form) in layers.items():
        seconds = taken[name]
        predicted = cost.time(form, N, m, n, r, dtype, machine)
        off = max(seconds / predicted, predicted / seconds)
        moved, flop = cost.work(form, N, m, n, r, dtype)
        rows.append(
            known
            | {"form": name, "ms": seconds * 1e3, "of dense": seconds / taken["dense"]}
            | {"of pair": seconds / taken["pair"], "of roof": cost.roof(form, N, m, n, r, dtype, machine) / seconds}
            | {"ms predicted": predicted * 1e3, "flag": f"wrong x{off:.1f}" if off > WRONG else ""}
            | {"error": errors[name], "right": errors[name] < TOLERANCE[dtype], "bytes": moved, "flop": flop}
            | {"density": 1.0 if name == "dense" else density_of_rank(m, n, r, "pair" if name == "pair" else "pifa")}
        )
    return rows
