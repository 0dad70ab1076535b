"""How long the factorization of a whole 7B model takes on the card: one layer of each shape is factored, and its
seconds count for all layers of that shape."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.gpu.cases import MODELS, TINY
from pifa_compile.compression.svd import spectrum
from pifa_compile.factors import rank_for_density
from pifa_compile.pivoting import factorize

BLOCKS = 32


def rows(device: str, tiny: bool, density: float = 0.5625) -> list[dict[str, Any]]:
    """A row per shape, and their sum over the model."""
    found, total = [], 0.0
    for layer, (m, n, each) in (TINY["tiny"] if tiny else MODELS["Llama-2-7B"]).items():
        weight = torch.randn(m, n, device=device)
        r = rank_for_density(m, n, density, 16)
        begun = _now(device)
        low_rank = spectrum(weight).truncate(r)
        truncated = _now(device)
        made = factorize(low_rank, torch.bfloat16)
        done = _now(device)
        total += each * BLOCKS * (done - begun)
        found.append({
            "layer": layer, "m": m, "n": n, "r": r, "layers": each * BLOCKS,
            "svd s": truncated - begun, "pivots and coefficients s": done - truncated,
            "model s": each * BLOCKS * (done - begun), "error": made.error, "ok": made.reason is None,
        })  # fmt: skip
    found.append({"layer": "all", "layers": sum(row["layers"] for row in found), "model s": total, "ok": True})
    return found


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
