"""Second processes: nothing is factored again, both compile caches hit, and a change of our sources misses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import pifa_compile.backend

if len(sys.argv) > 1:
    pifa_compile.backend.cache_tag = lambda: sys.argv[1]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 64)).eval()
with torch.no_grad():
    y = torch.compile(model, backend="pifa", options={"density": 0.6})(torch.ones(4, 64))
print(json.dumps({
    "pifa": dict(counters["pifa"]),
    "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
    "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
    "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
    "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
    "y": y.double().sum().item(),
}))
"""


def run(tmp_path: Path, *arguments: str) -> dict:
    environment = os.environ | {
        "PIFA_CACHE_DIR": str(tmp_path / "store"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {"cold": run(folder), "warm": run(folder), "edited": run(folder, "another digest"), "folder": folder}


def test_a_second_process_factors_nothing_and_gives_the_same(runs):
    assert runs["cold"]["pifa"]["factored"] == 2
    assert runs["warm"]["pifa"].get("factored", 0) == 0
    assert runs["warm"]["pifa"]["replaced"] == 2
    assert runs["warm"]["y"] == runs["cold"]["y"]


def test_both_compile_caches_hit_in_a_second_process(runs):
    assert runs["cold"]["aot_miss"] == runs["cold"]["fx_miss"] == 1
    assert (runs["warm"]["aot_hit"], runs["warm"]["aot_miss"], runs["warm"]["fx_miss"]) == (1, 0, 0)


def test_a_change_of_our_sources_misses_both(runs):
    assert (runs["edited"]["aot_hit"], runs["edited"]["aot_miss"]) == (0, 1)
    assert (runs["edited"]["fx_hit"], runs["edited"]["fx_miss"]) == (0, 1)


def test_the_inductor_cache_holds_no_factor_bytes(runs):
    from pifa_compile.store import Store

    store = Store(runs["folder"] / "store")
    (finished,) = store.runs()
    needles = [store.factors(r).pivot_rows.numpy().tobytes()[:256] for r in finished.layers]
    files = [p for p in (runs["folder"] / "inductor").rglob("*") if p.is_file()]
    assert files
    assert not [p for p in files for needle in needles if needle in p.read_bytes()]


def test_the_source_digest_covers_every_source_and_nothing_else(tmp_path, monkeypatch):
    import shutil

    import pifa_compile.fingerprint as fingerprint

    package = Path(fingerprint.__file__).parent
    copied = tmp_path / "pifa_compile"
    shutil.copytree(package, copied, symlinks=False)
    monkeypatch.setattr(fingerprint, "__file__", str(copied / "fingerprint.py"))
    digest = fingerprint.source_digest.__wrapped__
    first = digest()
    (copied / "notes.txt").write_text("no source")
    assert digest() == first
    kernels = ("kernels/lowering.py", "kernels/templates/tail.jinja", "kernels/tiles/nvidia-h200.json")
    for name in (*kernels, "passes/replace.py", "store/cache.py", "factors.py"):
        before = digest()
        (copied / name).write_text((copied / name).read_text() + "\n# edited\n")
        assert digest() != before, name
