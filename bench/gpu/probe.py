"""Whether what no card has tried ends, and is right: each in a process of its own, because programs that wait for ever
end only with their process, and a launch that fails takes its process with it. python -m bench.gpu.probe relay"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import Case, exact, random_factors, relative
from bench.gpu.layers import BOUNDS
from bench.gpu.tiles import no_substitute
from bench.gpu.timing import seconds_per_call
from pifa_compile.kernels import lowering
from pifa_compile.kernels.op import linear
from pifa_compile.kernels.siblings import siblings
from pifa_compile.kernels.tile_tables import EARLY, FormRow, Span, Table, table_for, use_table

TEMPLATES = ("relay", "tail_tma")
LIMIT_SECONDS = 60


def problems(names: Sequence[str]) -> dict[str, str]:
    """What went wrong with templates, or EARLY, each in its own process, side by side; nothing of what is right."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "bench.gpu.probe"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    running = {name: subprocess.Popen([*command, name], **pipes) for name in names}
    found = {}
    for name, process in running.items():
        try:
            _, told = process.communicate(timeout=max(1.0, LIMIT_SECONDS - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
            found[name] = f"did not end within {LIMIT_SECONDS} s"
            continue
        if process.returncode != 0:
            found[name] = told[-3000:]
    return found


def _table(name: str) -> Table:
    """The card's table with tiles of one template alone, or with all that can start early."""
    table = table_for(torch.cuda.get_device_name())
    if name == EARLY:
        return replace(table, untried=TEMPLATES)
    form = "relay" if name == "relay" else "tail"
    row = FormRow(form, Span(("bfloat16",), 1, None), (0.0, 1.0), "to be tried")
    return replace(table, tiles=tuple(t for t in table.tiles if t.template == name), forms=(row,), untried=())


def main(name: str) -> None:
    """Fail unless the kernels give the right numbers, many times over, and also from a CUDA graph."""
    lowering.register()
    shape = Case("probe", "", 4096, 4096, 1392)
    both = [random_factors(shape, torch.bfloat16, "cuda") for _ in range(2)]  # a kernel takes a tensor once
    given: list[Any] = [(f.pivot_rows, f.coefficients, f.row_order) for f in both]

    def alone(x: torch.Tensor) -> torch.Tensor:
        return linear(x, *given[0])

    def early(x: torch.Tensor) -> torch.Tensor:
        return siblings(x, *map(list, zip(*given, strict=True))) + torch.cat([linear(x, *f) for f in given], -1)

    def check(y: torch.Tensor, x: torch.Tensor) -> None:
        first, second = (exact(f, x) for f in both)
        error = relative(y, 2 * torch.cat([first, second], -1) if name == EARLY else first)
        assert error < BOUNDS[torch.bfloat16], error

    for tokens in (300, 2048) if name == "tail_tma" else (1, 16):
        with use_table(_table(name)), no_substitute(), torch.no_grad():
            compiled = torch.compile(early if name == EARLY else alone, fullgraph=True, dynamic=False)
            for _ in range(100 if tokens <= 16 else 5):
                x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
                check(compiled(x), x)
            check(seconds_per_call([partial(compiled, x)], "cuda").output, x)


if __name__ == "__main__":
    main(sys.argv[1])
