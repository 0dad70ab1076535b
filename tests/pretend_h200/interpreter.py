"""Runs generated Triton kernels on CPU tensors in Triton's interpreter, in a process of its own.

The interpreter has to be chosen before triton is imported, so this file is also the program of that process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretend_h200.codegen import Kernel


@dataclass
class Launch:
    """One launch: the kernel, its arguments in order (tensors and ints), and the grid."""

    kernel: Kernel
    arguments: list[Any]
    grid: tuple[int, int, int]


def interpret(sequences: Sequence[Sequence[Launch]]) -> list[list[list[Any]]]:
    """The arguments of every launch as the kernels left them; launches of one sequence share their tensors."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.pt", Path(folder) / "found.pt"
        torch.save([[vars(launch) for launch in sequence] for sequence in sequences], given)
        paths = [str(Path(__file__).parents[1]), *sys.path]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, __file__, str(given), str(found)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-8000:]
        return torch.load(found, weights_only=False)


class _Libdevice:
    """The functions of CUDA's libdevice that our epilogues call; the interpreter has none of them."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        one = {"exp": tl.exp, "erf": tl.erf, "sqrt": tl.sqrt, "rsqrt": tl.rsqrt}
        if name == "tanh":
            return lambda x: 2 / (1 + tl.exp(-2 * x)) - 1
        return one[name]


def _widen_bf16_products() -> None:
    """The interpreter holds bf16 as 16-bit integers and would multiply those: hand it float32."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )


def _one_launch_after_the_other() -> None:
    """A kernel that starts early has nothing to wait for here."""
    import triton.language as tl

    tl.extra.cuda.gdc_wait = tl.extra.cuda.gdc_launch_dependents = lambda: None


def _run(given: str, found: str) -> None:
    from torch._inductor.codecache import PyCodeCache

    _widen_bf16_products()
    _one_launch_after_the_other()
    sequences = torch.load(given, weights_only=False)
    for sequence in sequences:
        for launch in sequence:
            kernel: Kernel = launch["kernel"]
            module = PyCodeCache.load(kernel.source)
            module.libdevice = _Libdevice()
            getattr(module, kernel.name)[launch["grid"]](*launch["arguments"])
    torch.save([[launch["arguments"] for launch in sequence] for sequence in sequences], found)


if __name__ == "__main__":
    _run(*sys.argv[1:])
