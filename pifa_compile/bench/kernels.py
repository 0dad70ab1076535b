"""Every form of one layer, at one rank: dense, pair, PIFA, and PIFA with a folded order or an order of groups.

m = out_features, n = in_features, r = rank, N = number of tokens. Weights are random; each form is compared with what
its own factors make of x in float64.

Times are of one layer among others with weights of their own, in one compiled graph, so that weights come from memory
as they do in a model, while code and threads are as warm as there. (One layer called between reads of other memory is
another matter: on the machine of the results a call that does next to nothing then takes 0.4 ms, for any form.)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pifa_compile import _torch, cost
from pifa_compile.bench.factors import put_factors, random_factors
from pifa_compile.bench.report import Report, Row
from pifa_compile.bench.shapes import shapes
from pifa_compile.bench.timing import beyond_caches, in_turns
from pifa_compile.factors import density_of_rank, rank_for_density
from pifa_compile.kernels.few_tokens import serves
from pifa_compile.machine import profile
from pifa_compile.store import Store

#: Relative error of the output that rounding alone explains.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: Layers that take turns at most: all of them are compiled.
MOST_LAYERS = 32
#: A prediction that is off by more than this factor is flagged.
WRONG = 1.5

COLUMNS = ("layer", "m", "n", "rank", "dtype", "N", "freezing", "form", "ms", "of dense", "of pair", "of roof",
           "ms predicted", "flag", "right")  # fmt: skip


def bench_kernels(
    sets: Sequence[str],
    *,
    densities: Sequence[float] = (),
    tokens: Sequence[int] = (1, 16, 128, 512),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    freezing: Sequence[bool] = (False, True),
    rounds: int = 5,
    cold: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Time every form of every shape of the named sets.

    densities  of the ranks that pair and PIFA share; none: half of the smaller side
    cold       many layers take turns, so that weights come from memory; else one layer, with what the caches hold of it
    """
    caches = "cold" if cold else "warm"
    report = Report(f"forms of one layer at equal rank, caches {caches}, medians of {rounds} turns", COLUMNS)
    torch.manual_seed(0)
    known_machine = profile()
    assert known_machine is not None
    wanted: Sequence[float | None] = densities or [None]
    for (name, (m, n)), dtype, density in product(_named(sets), dtypes, wanted):
        r = min(m, n) // 2 if density is None else rank_for_density(m, n, density, 16)
        if r == 0:
            report.notes.append(f"{name}: no rank keeps {density:g} of a {m} x {n} weight")
            continue
        say(f"{name} {m} x {n}, rank {r}, {_torch.dtype_name(dtype)}")
        with tempfile.TemporaryDirectory() as folder:
            count = beyond_caches(m * n * dtype.itemsize, MOST_LAYERS) if cold else 1
            layers = _candidates(m, n, r, dtype, count, Path(folder))
            for frozen, N in product(freezing, tokens):
                known = {"layer": name, "m": m, "n": n, "rank": r, "dtype": _torch.dtype_name(dtype), "N": N}
                known |= {"freezing": frozen, "caches": caches, "layers": count}
                report.rows += _rows(layers, known, dtype, known_machine, rounds)
    wrong = sum(row["flag"] != "" for row in report.rows)
    report.notes.append(f"{wrong} of {len(report.rows)} predictions are wrong by more than {WRONG}")
    return report


def _named(sets: Sequence[str]) -> Iterable[tuple[str, tuple[int, int]]]:
    return [(f"{name}: {layer}", shape) for name in sets for layer, shape in shapes(name).items()]


class _Layers(nn.Module):
    """Layers of one kind side by side, each with an input and an output of its own."""

    def __init__(self, make: Callable[[], nn.Module], count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(count)).requires_grad_(False)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]

    def weight(self, index: int) -> Tensor:
        """What layer ``index`` does, a matrix in float64."""
        first, *others = (matrix.double() for matrix in self.layers[index].parameters())
        return functools.reduce(lambda product, matrix: matrix @ product, others, first)


@dataclass(frozen=True)
class _Candidate:
    """One form of a layer, several times: the module, the weight in float64 of its layer i, the form of the cost model,
    and where the factors are that the backend is to use (None: the module runs as it is)."""

    module: _Layers
    weight: Callable[[int], Tensor]
    form: str
    store: Path | None = None


def _candidates(m: int, n: int, r: int, dtype: torch.dtype, count: int, folder: Path) -> dict[str, _Candidate]:
    def linear(rows: int, columns: int) -> nn.Module:
        return nn.Linear(columns, rows, bias=False, dtype=dtype)

    dense = _Layers(lambda: linear(m, n), count)
    pair = _Layers(lambda: nn.Sequential(linear(r, n), linear(m, r)), count)
    found = {name: _Candidate(module, module.weight, name) for name, module in (("dense", dense), ("pair", pair))}
    orders: dict[str, Tensor | None] = {"pifa": None, "pifa folded": torch.arange(m)}
    if m % 32 == 0 and r % 32 == 0:
        groups = torch.cat([part.sort().values for part in torch.randperm(m // 32).split([r // 32, (m - r) // 32])])
        orders["pifa groups"] = (groups[:, None] * 32 + torch.arange(32)).flatten()
    for name, order in orders.items():
        factors = [random_factors(m, n, r, dtype, order, seed=seed) for seed in range(count)]
        unused = iter(factors)
        put_factors(dense, 0.5, lambda _, unused=unused: next(unused), Store(folder / name))  # type: ignore[misc]
        form = "pifa folded" if name == "pifa groups" else name
        found[name] = _Candidate(dense, lambda i, factors=factors: factors[i].weight(), form, folder / name)  # type: ignore[misc]
    return found


def _rows(
    layers: dict[str, _Candidate], known: Row, dtype: torch.dtype, machine: cost.Profile, rounds: int
) -> list[Row]:
    m, n, r, N, kind = (known[key] for key in ("m", "n", "rank", "N", "dtype"))
    x = torch.randn(N, n, generator=torch.Generator().manual_seed(1)).to(dtype)
    inputs = [x.view_as(x) for _ in range(known["layers"])]  # one for the caches, but none has siblings
    runs, errors = {}, {}
    torch.compiler.reset()
    with torch.no_grad():
        for name, layer in layers.items():
            run = functools.partial(_compile(layer, known["freezing"]), inputs)
            with _torch.freezing(known["freezing"] and layer.store is None):  # else Dynamo hides the weights from us
                found = run()
            errors[name] = max(_error(found[i], x, layer.weight(i)) for i in {0, known["layers"] - 1})
            runs[name] = run
        taken = {name: seconds / known["layers"] for name, seconds in in_turns(runs, rounds=rounds).items()}
    rows = []
    for name, layer in layers.items():
        few = layer.store is not None and serves(N, m, n, r, dtype, packed=known["freezing"])
        form, seconds = cost.FEW_TOKENS if few else layer.form, taken[name]
        predicted = cost.time(form, N, m, n, r, kind, machine)
        off = max(seconds / predicted, predicted / seconds)
        moved, flop = cost.work(form, N, m, n, r, kind)
        rows.append(
            known
            | {"form": name, "ms": seconds * 1e3, "of dense": seconds / taken["dense"]}
            | {"of pair": seconds / taken["pair"], "of roof": cost.roof(form, N, m, n, r, kind, machine) / seconds}
            | {"ms predicted": predicted * 1e3, "flag": f"wrong x{off:.1f}" if off > WRONG else ""}
            | {"error": errors[name], "right": errors[name] < TOLERANCE[dtype], "bytes": moved, "flop": flop}
            | {"density": 1.0 if name == "dense" else density_of_rank(m, n, r, "pair" if name == "pair" else "pifa")}
        )
    return rows


def _error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    wanted = x.double() @ weight.T
    return float((found.double() - wanted).norm() / wanted.norm())


def _compile(layer: _Candidate, freezing: bool) -> Callable[[list[Tensor]], list[Tensor]]:
    own = _torch.own_frame(layer.module)
    if layer.store is None:
        return torch.compile(own, dynamic=False)
    options: dict[str, Any] = {"store": str(layer.store), "freezing": freezing, "pairs": False}
    return torch.compile(own, backend="pifa", dynamic=False, options=options)
