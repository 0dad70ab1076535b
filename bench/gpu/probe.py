"""Whether what no card has tried ends, and is right: each in a process of its own, because programs that wait for ever
end only with their process, and a launch that fails takes its process with it. python -m bench.gpu.probe relay"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import Case, exact, random_factors, relative
from bench.gpu.layers import BOUNDS, all_templates, forced
from pifa_compile.kernels import lowering
from pifa_compile.kernels.op import linear
from pifa_compile.kernels.siblings import siblings
from pifa_compile.kernels.tile_tables import EARLY

RELAY = "relay"
LIMIT_SECONDS = 60


def problem(name: str) -> str | None:
    """What went wrong in the other process with RELAY or EARLY; None if nothing did."""
    command = [sys.executable, "-m", "bench.gpu.probe", name]
    try:
        root = Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=root)
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT_SECONDS} s"
    return None if done.returncode == 0 else done.stderr[-300:]


def main(name: str) -> None:
    """Fail unless the kernels give the right numbers, many times over."""
    lowering.register()
    shape = Case("probe", "", 4096, 4096, 1392)
    both = [random_factors(shape, torch.bfloat16, "cuda") for _ in range(2)]  # a kernel takes a tensor once
    given: list[Any] = [(f.pivot_rows, f.coefficients, f.row_order) for f in both]

    def relay(x: torch.Tensor) -> torch.Tensor:
        return linear(x, *given[0])

    def early(x: torch.Tensor) -> torch.Tensor:
        return siblings(x, *map(list, zip(*given, strict=True))) + torch.cat([linear(x, *f) for f in given], -1)

    for tokens in (1, 16):
        with all_templates("cuda", early=name == EARLY), torch.no_grad(), ExitStack() as stack:
            if name == RELAY:
                stack.enter_context(forced("cuda", RELAY))
            compiled = torch.compile(relay if name == RELAY else early, fullgraph=True, dynamic=False)
            for _ in range(100):
                x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
                first, second = (exact(f, x) for f in both)
                error = relative(compiled(x), first if name == RELAY else 2 * torch.cat([first, second], -1))
                assert error < BOUNDS[torch.bfloat16], error


if __name__ == "__main__":
    main(sys.argv[1])
