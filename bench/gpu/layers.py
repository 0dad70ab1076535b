"""One linear layer in every form, side by side: dense, the pair at equal rank, PIFA as it was published, every form of
this package, and 2:4 semi-structured sparsity. Each row has its error against float64 and its share of the roof."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cases import Case, exact, random_factors, relative
from bench.gpu.roof import Roof
from bench.gpu.timing import copies, inductor, seconds_per_call
from pifa_compile.kernels import kernel_forms as forms
from pifa_compile.kernels import lowering, tile_tables
from pifa_compile.kernels.op import linear
from pifa_compile.passes.align import GROUP

Row = dict[str, Any]
#: Relative error up to which a row counts as right; of 2:4 and dense against their own weight.
BOUNDS = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 2e-3}
CHECKED_TOKENS = 64  # spread over all
#: What is not run: templates, and EARLY, that were wrong or did not end when they were tried in a process of their own.
EXCLUDED: set[str] = set()


@dataclass
class Way:
    """One way to run a layer: its calls on rotated inputs, and what it must move and multiply per call."""

    name: str
    make: Callable[[int], tuple[list[Callable[[], Tensor]], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]
    numbers: int
    flop_per_token: int
    context: Callable[[], Any] = nullcontext
    layers: int = 1


class DeviceLost(RuntimeError):
    """Nothing can run on the device any more, as after an illegal access or a capture that broke off."""


def failure(problem: Exception, device: str) -> Row:
    """The columns of a row that failed; raises DeviceLost if all later ones would fail too."""
    words = f"{type(problem).__name__}: {problem}"
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.randn(1, device=device)
        except Exception as lost:
            raise DeviceLost(words[:3000]) from lost
    return {"ok": False, "problem": words[:300]}


def published(x: Tensor, rows: Tensor, c: Tensor, pivots: Tensor, others: Tensor) -> Tensor:
    """Two library products and two index copies."""
    y_p = x @ rows.T
    y = x.new_empty(x.shape[0], pivots.shape[0] + others.shape[0])
    y.index_copy_(1, pivots, y_p)
    return y.index_copy_(1, others, y_p @ c.T)


def ways(case: Case, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Way]:
    """All but 2:4 sparsity."""
    m, n, r = case.m, case.n, case.r
    inputs = lambda count: [torch.randn(tokens, n, device=device).to(dtype) for _ in range(count)]  # noqa: E731

    def pair(count: int) -> Any:
        right = [(torch.randn(r, n, device=device) / n**0.5).to(dtype) for _ in range(count)]
        left = [(torch.randn(m, r, device=device) / r**0.5).to(dtype) for _ in range(count)]
        run = lambda x, i=0: F.linear(F.linear(x, right[i]), left[i])  # noqa: E731
        calls = [lambda x=x, i=i: run(x, i) for i, x in enumerate(inputs(count))]
        return calls, run, (lambda x: x.double() @ right[0].double().T @ left[0].double().T)

    def pifa(
        function: Callable[..., Tensor], split: bool, coefficients: torch.dtype | None = None, group: int = 1
    ) -> Any:
        def make(count: int) -> Any:
            factors = [random_factors(case, dtype, device, coefficients, group) for _ in range(count)]
            order = lambda f: (f.row_order[:r].long(), f.row_order[r:].long()) if split else (f.row_order,)  # noqa: E731
            given = [(f.pivot_rows, f.coefficients, *order(f)) for f in factors]
            calls = [lambda x=x, g=g: function(x, *g) for x, g in zip(inputs(count), given, strict=True)]
            return calls, (lambda x: function(x, *given[0])), (lambda x: exact(factors[0], x))

        return make

    kept, flop = r * (m + n - r), 2 * r * (m + n - r)
    yield _dense(case, tokens, dtype, device)
    yield Way("pair", pair, r * (m + n), 2 * r * (m + n))
    yield Way("published", pifa(published, True), kept, flop)
    for form in sorted(forms.available(torch.device(device), dtype, tokens)):
        lowering.register()
        compiled = torch.compile(lambda *a: linear(*a), backend=inductor(device), fullgraph=True, dynamic=False)
        yield Way(f"pifa {form}", pifa(compiled, False), kept, flop, lambda form=form: forced(device, form))
    if device == "cuda" and m % GROUP == r % GROUP == 0:
        promised = partial(linear, aligned=GROUP)  # what it costs in error: bench/pivoting.py
        compiled = torch.compile(lambda *a: promised(*a), backend=inductor(device), fullgraph=True, dynamic=False)
        name = f"pifa tail, groups of {GROUP}"
        yield Way(name, pifa(compiled, False, group=GROUP), kept, flop, lambda: forced(device, "tail"))
    if dtype == torch.bfloat16:  # coefficients and y_p in float16, which rounds them eight times less
        compiled = torch.compile(lambda *a: linear(*a), backend=inductor(device), fullgraph=True, dynamic=False)
        yield Way("pifa, fp16 coefficients", pifa(compiled, False, torch.float16), kept, flop)


def _dense(case: Case, tokens: int, dtype: torch.dtype, device: str) -> Way:
    m, n = case.m, case.n

    def make(count: int) -> Any:
        weights = [(torch.randn(m, n, device=device) / n**0.5).to(dtype) for _ in range(count)]
        return _products(weights, weights[0], tokens)

    return Way("dense", make, m * n, 2 * m * n)


def _products(weights: list[Tensor], first: Tensor, tokens: int) -> Any:
    """What a way makes of weights that the library multiplies; ``first`` is the first of them as plain numbers."""
    given = [torch.randn(tokens, first.shape[1], device=first.device).to(first.dtype) for _ in weights]
    calls = [lambda x=x, w=w: F.linear(x, w) for x, w in zip(given, weights, strict=True)]
    return calls, (lambda x: F.linear(x, weights[0])), (lambda x: x.double() @ first.double().T)


def sparse_ways(case: Case, tokens: int, dtype: torch.dtype, device: str) -> Iterator[Way]:
    """Dense, and 2:4 semi-structured sparsity, for a card that can multiply such weights."""
    from torch.sparse import to_sparse_semi_structured

    m, n = case.m, case.n

    def make(count: int) -> Any:
        weights, pruned = [], []
        for _ in range(count):
            w = torch.randn(m, n, device=device).view(m, n // 4, 4) / n**0.5
            keep = torch.zeros_like(w).scatter_(2, w.abs().topk(2, dim=2).indices, 1.0)
            pruned.append((w * keep).view(m, n).to(dtype))
            weights.append(to_sparse_semi_structured(pruned[-1]))
        return _products(weights, pruned[0], tokens)

    yield _dense(case, tokens, dtype, device)
    yield Way("2:4", make, m * n * 9 // 16, 2 * m * n)


def all_templates(device: str, *, early: bool = False) -> Any:
    """Have the card's table with all its templates, also those that it has not tried yet; ``early``: and such tiles.
    Without those that are excluded."""
    if device == "cpu":
        return nullcontext()
    untried = tuple(EXCLUDED | (set() if early else {tile_tables.EARLY}))
    return tile_tables.use_table(replace(tile_tables.table_for(torch.cuda.get_device_name()), untried=untried))


def forced(device: str, form: str) -> Any:
    """Have every layer in one form, with the tiles of the table in force."""
    if device == "cpu":
        return nullcontext()
    table = tile_tables.table_for(torch.cuda.get_device_name())
    row = tile_tables.FormRow(form, tile_tables.Span(("float16", "bfloat16", "float32"), 1, None), (0.0, 1.0), "forced")
    return tile_tables.use_table(replace(table, forms=(row,)))


def measure(way: Way, case: Case, tokens: int, dtype: torch.dtype, device: str, roof: Roof) -> Row:
    """One row; what goes wrong is in it."""
    name = str(dtype).removeprefix("torch.")
    row: Row = {**case.named(), "N": tokens, "dtype": name, "way": way.name}
    moved = (way.numbers + tokens * (case.n + way.layers * case.m)) * dtype.itemsize
    flop = way.flop_per_token * tokens
    torch.compiler.reset()
    try:
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(way.context())
            calls, run, wanted = way.make(copies(moved, device))
            x = torch.randn(tokens, case.n, device=device).to(dtype)
            some = torch.arange(0, tokens, -(-tokens // CHECKED_TOKENS), device=device)
            error = relative(run(x)[some], wanted(x[some]))
            seconds = seconds_per_call(calls, device)
            error = max(error, relative(seconds.output, calls[0]()))  # as it was timed, against the same call by itself
    except Exception as problem:  # a row that fails must not end the run, nor be hidden
        return row | failure(problem, device)
    return row | {
        "us": seconds.median * 1e6,
        "low us": seconds.low * 1e6,
        "high us": seconds.high * 1e6,
        "roof": roof.seconds(moved, flop, name) / seconds.median,
        "error": error,
        "ok": error < BOUNDS[dtype],
    }


def rows(
    case: Case,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    roof: Roof,
    among: Callable[[Case, int, torch.dtype, str], Iterator[Way]] = ways,
) -> list[Row]:
    """Every way for one layer, with the ratio of its time to the dense one's."""
    found = [measure(way, case, tokens, dtype, device, roof) for way in among(case, tokens, dtype, device)]
    dense = next((row["us"] for row in found if row["way"] == "dense" and "us" in row), None)
    card = torch.cuda.get_device_name() if device == "cuda" else None
    call = forms.Call(card, str(dtype).removeprefix("torch."), tokens, case.m, case.n, case.r)
    chosen = f"pifa {forms.form_for(call)}"
    for row in found:
        row["default"] = row["way"] == chosen
        if dense and "us" in row:
            row["of dense"] = row["us"] / dense
    return found
