"""Whether what no card has tried ends, and is right: each in a process of its own, because programs that wait for ever
end only with their process, and a launch that fails takes its process with it. python -m bench.gpu.probe relay"""

from __future__ import annotations

import subprocess
import sys
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
    factors = random_factors(Case("probe", "", 4096, 4096, 1392), torch.bfloat16, "cuda")
    given: list[Any] = [factors.pivot_rows, factors.coefficients, factors.row_order]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return linear(x, *given)

    def two_layers(x: torch.Tensor) -> torch.Tensor:
        return siblings(x, *([tensor, tensor] for tensor in given)) + torch.cat([layer(x)] * 2, -1)

    for tokens in (1, 16):
        with forced("cuda", RELAY) if name == RELAY else all_templates("cuda", early=name == EARLY), torch.no_grad():
            compiled = torch.compile(layer if name == RELAY else two_layers, fullgraph=True, dynamic=False)
            for _ in range(100):
                x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
                y, wanted = compiled(x), exact(factors, x)
                error = relative(y, wanted if name == RELAY else 2 * torch.cat([wanted, wanted], -1))
                assert error < BOUNDS[torch.bfloat16], error


if __name__ == "__main__":
    main(sys.argv[1])
