"""Whether the relay ends, and is right: tried in a process of its own, because programs that wait for ever end only
with their process. python -m bench.gpu.probe"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu.cases import Case, exact, random_factors, relative
from bench.gpu.layers import BOUNDS, forced
from pifa_compile.kernels import lowering
from pifa_compile.kernels.op import linear

FORM = "relay"
LIMIT_SECONDS = 60


def problem() -> str | None:
    """What went wrong in the other process; None if nothing did."""
    command = [sys.executable, "-m", "bench.gpu.probe"]
    try:
        root = Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=root)
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT_SECONDS} s"
    return None if done.returncode == 0 else done.stderr[-300:]


def main() -> None:
    """Fail unless the relay gives the right numbers, many times over."""
    lowering.register()
    for tokens in (1, 16):
        factors = random_factors(Case("probe", "", 4096, 4096, 1392), torch.bfloat16, "cuda")
        given = (factors.pivot_rows, factors.coefficients, factors.row_order)
        with forced("cuda", FORM), torch.no_grad():
            compiled = torch.compile(lambda x, given=given: linear(x, *given), fullgraph=True, dynamic=False)
            for _ in range(100):
                x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
                error = relative(compiled(x), exact(factors, x))
                assert error < BOUNDS[torch.bfloat16], error


if __name__ == "__main__":
    main()
