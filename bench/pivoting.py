"""Seconds and error of every way to choose pivots, for one weight: python bench/pivoting.py [m n r].

m = out_features, n = in_features, r = rank. The low-rank weight is made with singular values from 1 to 0.01, so that no
decomposition of it has to be waited for. Seconds are medians; the error is the stored factors' against the weight.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from tabulate import tabulate

from pifa_compile.digest import cast_digests, digest
from pifa_compile.pivoting import LowRank, choose_pivots, pivot

REPEATS = 3


def make(m: int, n: int, r: int) -> LowRank:
    """A weight of rank r with known singular vectors."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, r)).Q for size in (m, n))
    return LowRank(left * torch.logspace(0, -2, r), right.T.contiguous())


def measure(weight: LowRank, pivoting: str, group: int, dtype: torch.dtype) -> dict[str, object]:
    """Median seconds of the choice, and of coefficients and error together."""
    choice, rest, error = [], [], 0.0
    for _ in range(REPEATS):
        begun = time.perf_counter()
        pivots = choose_pivots(weight.coordinates, pivoting, group)
        chosen = time.perf_counter()
        _, error = pivot(weight, pivots, dtype)
        choice.append(chosen - begun)
        rest.append(time.perf_counter() - chosen)
    name = pivoting if group == 1 else f"groups of {group}"
    seconds = [statistics.median(times) for times in (choice, rest)]
    return {"pivots": name, "dtype": str(dtype), "choice s": seconds[0], "rest s": seconds[1], "error": error}


def digest_rates(weight: torch.Tensor) -> dict[str, float]:
    """GB of the weight per second, for its digest and for the digests of its casts too."""
    rates = {}
    for name, function in (("digest", digest), ("digest and casts", cast_digests)):
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            function(weight)
            times.append(time.perf_counter() - begun)
        rates[name] = weight.nbytes / 1e9 / statistics.median(times)
    return rates


def main() -> None:
    """Print the table and, as the last line, its rows as JSON."""
    m, n, r = (int(word) for word in sys.argv[1:4]) if len(sys.argv) > 3 else (4096, 4096, 1199)
    weight = make(m, n, r)
    ways = [("maxvol", 1), ("qr", 1), ("lu", 1)]
    rows = [measure(weight, *way, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16) for way in ways]
    aligned = make(m, n, r - r % 8)
    rows += [measure(aligned, "maxvol", 8, torch.bfloat16)]
    print(f"{m} x {n}, rank {r}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(tabulate(rows, "keys", floatfmt=".3g"))
    rates = digest_rates(weight.weight())
    print(", ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items()))
    print(json.dumps({"rows": rows, "digest GB/s": rates}))


if __name__ == "__main__":
    main()
