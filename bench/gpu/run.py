"""All GPU benchmarks within a budget of seconds, the rows that matter most first: python -m bench.gpu.run.

What the budget does not allow is listed as left out. The exit status is 1 if a row is wrong or failed; 2:4 sparsity, of
which libraries and cards serve some shapes only, is excepted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # tables are forced here, which the caches' keys do not know

import torch

from bench.gpu import factoring, layers, models, probe, report, roof
from bench.gpu.cases import MODELS, TINY, cases, squares
from bench.gpu.timing import Budget
from pifa_compile.kernels.tile_tables import EARLY

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Step = tuple[str, float, Callable[[], list[report.Row]]]


def steps(device: str, tiny: bool, top: roof.Roof) -> Iterator[Step]:
    """(section, seconds that it may take, what makes its rows), in order of worth."""
    named = TINY if tiny else MODELS

    def layer(section: str, chosen: list[layers.Case], counts: tuple[int, ...], dtype: torch.dtype) -> Iterator[Step]:
        for tokens in counts:
            for case in chosen:
                yield section, 8, partial(layers.rows, case, tokens, dtype, device, top)

    first = {name: named[name] for name in list(named)[:1]}
    others = {name: named[name] for name in list(named)[1:]}
    dtype = FP32 if tiny else BF16
    yield from layer("layers", cases(first, 0.5625), (3,) if tiny else (1, 16, 2048), dtype)
    for density in models.DENSITIES:
        batches, prefill = ((2,), 16) if tiny else ((1, 16), 2048)
        yield "models", 60, partial(models.model_rows, density, batches, prefill, device, tiny)
    for tokens in (16,) if tiny else (2048, 1):
        yield "blocks", 45, partial(models.block_rows, tokens, device, tiny)
    yield "factorization", 40, partial(factoring.rows, device, tiny)
    w, shares = (64, (0.5,)) if tiny else (4096, (0.5, 0.25, 0.75, 0.1, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9))
    yield from layer("ranks", squares(w, shares), (4,) if tiny else (1, 2048), dtype)
    if not tiny:
        for tokens in (2048, 1, 16):
            for case in cases(first, 0.5625):
                yield "tiles", 25, partial(layers.tile_rows, case, tokens, BF16, device, top)
        yield from layer("layers", cases(first, 0.5625), (256, 8192), BF16)
        yield from layer("layers", cases(first, 0.5625), (1, 2048), FP16)
        yield from layer("layers", cases(others, 0.5625), (1, 16, 2048, 256, 8192), BF16)
        yield from layer("layers", cases(first, 0.5625), (1, 2048), FP32)


def _rows(section: str, make: Callable[[], list[report.Row]]) -> list[report.Row]:
    """The rows of one step, printed."""
    try:
        rows = make()
    except Exception as problem:  # what a step could not even begin must not end the run, nor be hidden
        rows = [{"way": section, "ok": False, "problem": f"{type(problem).__name__}: {problem}"[:300]}]
    for row in rows:
        print(section, {key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()})
    return rows


def main() -> int:
    """Run, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=450, help="budget (default: 450)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a rehearsal of every step")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return 0
    budget = Budget(given.seconds)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    facts = report.about(given.device)
    where = report.folder(given.results, facts)
    top = roof.measure(given.device, given.tiny, (BF16, FP16, FP32))
    facts |= {"TB/s": top.bytes_per_second / 1e12, "TFLOP/s": {k: v / 1e12 for k, v in top.flop_per_second.items()}}
    print(facts)
    sections: dict[str, list[report.Row]] = {}
    for name in (probe.RELAY, EARLY) if given.device == "cuda" else ():
        if (problem := probe.problem(name)) is not None:
            layers.EXCLUDED.add(name)
            sections.setdefault("probe", []).append({"way": f"pifa {name}", "ok": False, "problem": problem})
    left_out: list[str] = []
    with layers.all_templates(given.device):
        for number, (section, seconds, make) in enumerate(steps(given.device, given.tiny, top)):
            if budget.allows(seconds):
                sections.setdefault(section, []).extend(_rows(section, make))
            else:
                left_out.append(f"step {number} ({section})")
            report.write(where, facts, sections, left_out)
    for section in ("layers", "ranks"):
        report.plot(where, sections.get(section, []), section)
    wrong = [row for rows in sections.values() for row in rows if not row["ok"] and row.get("way") != "2:4"]
    count = sum(map(len, sections.values()))
    print(f"{count} rows, {len(wrong)} wrong or failed, {len(left_out)} steps left out: {where}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
