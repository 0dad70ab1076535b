"""What ``apply_`` takes of memory: the factors beside the dense weights at its peak, then the factors alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pifa_compile
from pifa_compile.digest import digest
from pifa_compile.factors import PifaFactors, rank_for_density
from pifa_compile.store import LayerRecord, RunHeader, Store

LAYERS, W = 8, 1536
RANK = rank_for_density(W, W, 0.6)
DENSE = 4 * W * W  # bytes of a layer
FACTORS = 4 * RANK * (2 * W - RANK) + 4 * W
SLACK = 4 << 20  # bytes by which the process grows by itself


def dense_model(width: int = W, layers: int = LAYERS) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).requires_grad_(False).eval()


def put_run(model: nn.Sequential, store: Store) -> None:
    """A run of the model with factors of its shapes and any numbers: how they were found does not matter here."""
    header = {"recipe": {"method": "svd"}, "versions": {}, "created": "2026-01-01T00:00:00+00:00"}
    with store.write_run(RunHeader(run_id="any", model="m", layers_planned=len(model), **header)) as writer:
        for name, layer in model.named_children():
            w = layer.in_features
            r = rank_for_density(w, w, 0.6)
            order = torch.arange(w, dtype=torch.int32)
            factors = PifaFactors(torch.randn(r, w), torch.randn(w - r, r), order)
            size = {"numbers": factors.numbers, "bytes": factors.nbytes, "seconds": 0.0}
            known = {"name": name, "shape": factors.shape, "form": "pifa", "rank": r}
            weight = {"float32": digest(layer.weight.detach())}
            writer.add(LayerRecord(digests=weight, object=store.put_factors(factors), **known, **size))
        writer.finish()


def measure(root: str, kept: str) -> None:
    """In a process of its own: bytes by which it grows at most while a model is prepared, and afterwards.

    kept  what is held on to although it should not be: "nothing", "dense" weights or a "copy" of the factors
    """
    small, store = dense_model(64, 2), Store(Path(root) / f"small-{os.getpid()}")
    put_run(small, store)
    pifa_compile.apply_(small, store=store)  # imports, thread pools
    model, held = dense_model(), []
    if kept == "dense":
        held += model.parameters()
    if kept == "copy":
        read = Store.factors
        Store.factors = lambda *given: held.append(read(*given)) or read(*given)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    pifa_compile.apply_(model, store=Path(root) / "large")
    assert all(type(layer) is pifa_compile.PifaLinear for layer in model)
    print(json.dumps({"peak": status("VmHWM") - before, "after": status("VmRSS") - before}))


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def grown(root: Path, kept: str) -> dict[str, int]:
    code = f"import runpy; runpy.run_path({__file__!r})['measure']({str(root)!r}, {kept!r})"
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    path["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # what is freed goes back at once, as it does anyway for large matrices
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apply")
    put_run(dense_model(), Store(folder / "large"))
    return folder


needs_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of resident memory to reset"
)


@needs_peak
def test_at_its_peak_there_are_the_factors_and_afterwards_no_dense_weights(root):
    found = grown(root, "nothing")
    assert found["peak"] <= LAYERS * FACTORS + DENSE + SLACK, found
    assert found["after"] <= LAYERS * (FACTORS - DENSE) + SLACK, found


@needs_peak
@pytest.mark.slow
def test_the_bounds_would_tell_what_is_kept(root):
    dense, copy = grown(root, "dense"), grown(root, "copy")
    assert dense["after"] > LAYERS * (FACTORS - DENSE) + SLACK + DENSE, dense
    assert copy["peak"] > LAYERS * FACTORS + DENSE + SLACK + DENSE, copy
