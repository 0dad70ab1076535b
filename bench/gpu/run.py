"""All GPU benchmarks within a budget of seconds, the rows that matter most first: python -m bench.gpu.run.

The tiles of the card's table compete first, then the forms of a block; all that comes after runs with the table that
they settle, which is left as table.json: a copy of it in kernels/tiles/ makes it the card's own.

What the budget does not allow is listed as left out. The exit status is 1 if a row is wrong or failed; 2:4 sparsity, of
which libraries and cards serve some shapes only, is excepted.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # tables are forced here, which the caches' keys do not know

import torch

from bench.gpu import factoring, layers, models, probe, report, roof, settle, tiles
from bench.gpu.cases import MODELS, TINY, cases, squares
from bench.gpu.llama import Weights
from bench.gpu.timing import Budget
from pifa_compile._torch import autotuner
from pifa_compile.kernels.tile_tables import EARLY, Table, table_for, use_table, write

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SECTIONS = ("tiles", "blocks", "models", "ranks", "layers", "factorization", "2:4")
Step = tuple[str, float, Callable[[], list[report.Row]]]
Sections = dict[str, list[report.Row]]

#: Where tiles compete: layers of Llama-2-7B, how many of them read the same tokens, and how many tokens.
CONTESTS = (
    ("q, k, v, o", 1, 2048),
    ("q, k, v, o", 3, 1),
    ("q, k, v, o", 1, 1),
    ("gate, up", 1, 2048),
    ("gate, up", 2, 1),
    ("q, k, v, o", 3, 16),
    ("q, k, v, o", 1, 16),
    ("down", 1, 2048),
    ("down", 1, 1),
    ("gate, up", 2, 16),
    ("down", 1, 16),
)
DECIDED_BY = 260  # seconds that must be left for another contest: what it decides is to be measured too


def steps(device: str, tiny: bool, top: roof.Roof) -> Iterator[Step]:
    """(section, seconds that must be left, what makes its rows), in order of worth."""
    named = TINY if tiny else MODELS

    def layer(section: str, chosen: list[layers.Case], counts: tuple[int, ...], dtype: torch.dtype) -> Iterator[Step]:
        for tokens in counts:
            for case in chosen:
                yield section, 20, partial(layers.rows, case, tokens, dtype, device, top)

    first = {name: named[name] for name in list(named)[:1]}
    others = {name: named[name] for name in list(named)[1:]}
    dtype = FP32 if tiny else BF16
    by_layer = {case.layer: case for case in cases(first, models.SMALLEST.density)}
    for name, together, tokens in () if tiny else CONTESTS:
        yield "tiles", DECIDED_BY, partial(tiles.rows, by_layer[name], together, tokens, BF16, device, top)
    batches, prefill, w = ((2,), 16, 64) if tiny else ((1, 16), 2048, 4096)

    def model(*kinds: Weights) -> Iterator[Step]:
        for weights in kinds:
            yield "models", 40, partial(models.model_rows, weights, batches, prefill, device, tiny)

    for tokens in (16,) if tiny else (2048, 1):
        yield "blocks", 45, partial(models.block_rows, tokens, device, tiny)
    yield from model(models.DENSE, models.SMALLEST)
    yield from layer("ranks", squares(w, (0.5,)), (4,) if tiny else (2048, 1), dtype)
    yield from layer("layers", cases(first, 0.5625), (3,) if tiny else (2048, 1), dtype)
    yield from model(*(weights for weights in models.WEIGHTS if weights not in (models.DENSE, models.SMALLEST)))
    yield "factorization", 60, partial(factoring.rows, device, tiny)
    if not tiny:
        for tokens in (2048, 1):
            for case in cases(first, 0.5625):
                yield "2:4", 10, partial(layers.rows, case, tokens, BF16, device, top, layers.sparse_ways)
        yield "blocks", 45, partial(models.block_rows, 16, device, tiny)
        yield from layer("layers", cases(first, 0.5625), (16, 256, 8192), BF16)
        yield from layer("ranks", squares(w, (0.25, 0.75, 0.1, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)), (2048, 1), BF16)
        yield from layer("layers", cases(first, 0.5625), (1, 2048), FP16)
        yield from layer("layers", cases(others, 0.5625), (1, 16, 2048, 256, 8192), BF16)
        yield from layer("layers", cases(first, 0.5625), (1, 2048), FP32)


def _rows(section: str, make: Callable[[], list[report.Row]]) -> list[report.Row]:
    """The rows of one step, printed."""
    try:
        rows = make()
    except layers.DeviceLost:
        raise
    except Exception as problem:  # what a step could not even begin must not end the run, nor be hidden
        rows = [{"way": section, "ok": False, "problem": f"{type(problem).__name__}: {problem}"[:300]}]
    for row in rows:
        print(section, {key: round(v, 5) if isinstance(v, float) else v for key, v in row.items() if key != "tile"})
    return rows


def _probe() -> list[report.Row]:
    """What never runs here because it was wrong in a process of its own, or cannot."""
    names = {*probe.TEMPLATES, EARLY} if autotuner().launches_early() else {*probe.TEMPLATES}
    found = probe.problems(sorted(names))
    layers.EXCLUDED.update({EARLY} - names, found)
    for name, problem in found.items():
        print(f"{name} is not used: {problem}")
    return [{"way": f"pifa {name}", "ok": False, "problem": problem[-300:]} for name, problem in found.items()]


def _settle(shipped: Table, facts: dict[str, Any], sections: Sections, where: Path) -> Table:
    """The card's table after what was measured so far, also on disk."""
    settled = settle.settle(shipped, facts, sections)
    facts["removed tiles"] = settled.removed
    (where / "table.json").write_text(write(settled.table), encoding="utf-8")
    return settled.table


def main() -> int:
    """Run, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="budget (default: 450)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a rehearsal of every step")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, help="only these; rows that the same revision left of others stay"
    )
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return 0
    budget = Budget(given.seconds)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    facts = report.about(given.device)
    where = report.folder(given.results, facts)
    wanted = given.sections or SECTIONS
    sections = {name: rows for name, rows in report.kept(where, facts).items() if name not in wanted}
    top = roof.measure(given.device, given.tiny, (BF16, FP16, FP32))
    facts |= {"TB/s": top.bytes_per_second / 1e12, "TFLOP/s": {k: v / 1e12 for k, v in top.flop_per_second.items()}}
    facts["launch us"] = top.launch_seconds * 1e6
    print(facts)
    on_card = given.device == "cuda"
    if on_card and (wrong := _probe()):
        sections["probe"] = wrong
    left_out: list[str] = []
    shipped = table_for(facts["card"]) if on_card else None
    numbered = enumerate(steps(given.device, given.tiny, top))
    with ExitStack() as tables:
        for section, own in itertools.groupby(numbered, key=lambda step: step[1][0]):
            if shipped is not None and section != "tiles":
                tables.enter_context(use_table(_settle(shipped, facts, sections, where)))
            for number, (_, seconds, make) in own if section in wanted else ():
                try:
                    found = _rows(section, make) if budget.allows(seconds) else None
                except layers.DeviceLost as lost:
                    budget = Budget(0)
                    found = [{"way": section, "ok": False, "problem": f"the device was lost: {lost}"}]
                if found is None:
                    left_out.append(f"step {number} ({section})")
                else:
                    sections.setdefault(section, []).extend(found)
                report.write(where, facts, sections, left_out)
    wrong = [row for rows in sections.values() for row in rows if not row["ok"] and row.get("way") != "2:4"]
    count = sum(map(len, sections.values()))
    print(f"{count} rows, {len(wrong)} wrong or failed, {len(left_out)} steps left out: {where}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
