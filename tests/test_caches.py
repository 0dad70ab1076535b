"""Second processes factor, compile, tune and measure nothing again; a change of our sources misses the caches."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import counting_compiler
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import Svd

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import pifa_compile
import pifa_compile.backend
from pifa_compile import machine

profiles = []
machine.measure_profile = lambda *given: profiles.append(given)
given = json.loads(sys.argv[1])
if "tag" in given:
    pifa_compile.backend.cache_tag = lambda: given["tag"]
width, device = given.get("width", 64), given.get("device", "cpu")

TUNING = ("select_algorithm", "coordesc_tuning")

def measured(model, **settings):
    counters.clear()
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", **settings)(torch.ones(4, width, device=device))
    return {
        "pifa": dict(counters["pifa"]),
        "graphs": counters["stats"]["unique_graphs"],
        "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
        "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
        "tuned": sum(n for key, n in counters["inductor"].items() if key.startswith(TUNING)),
        "benchmarked": sum(n for key, n in counters["inductor"].items() if key.startswith("benchmarking")),
        "profiles": len(profiles),
        "y": y.double().sum().item(),
    }

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)).eval().to(device)
found = measured(model, options={"density": 0.6, **given.get("options", {})})
if given.get("prepared"):
    found["prepared"] = measured(pifa_compile.apply_(model, density=0.6))
print(json.dumps(found))
"""


def run(folder: Path, **given: object) -> dict:
    """What SCRIPT finds, and under "compilations" how often a C++ compiler was called with something to compile."""
    compiler, calls = counting_compiler(folder)
    environment = os.environ | {
        "PIFA_CACHE_DIR": str(folder / "store"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CXX": str(compiler),
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"compilations": len(calls())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    cold, warm = (run(folder, prepared=True) for _ in range(2))
    return {"cold": cold, "warm": warm, "edited": run(folder, tag="another digest"), "folder": folder}


def cache_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "inductor").rglob("*") if path.is_file())


def test_a_second_process_factors_nothing_and_gives_the_same(runs):
    assert runs["cold"]["pifa"]["factored"] == 2
    assert runs["warm"]["pifa"].get("factored", 0) == 0
    assert runs["warm"]["pifa"]["replaced"] == 2
    assert runs["warm"]["y"] == runs["cold"]["y"]


def test_a_second_process_compiles_tunes_and_measures_nothing(runs):
    cold, warm = runs["cold"], runs["warm"]
    assert cold["compilations"] > 0 and warm["compilations"] == 0
    assert (warm["tuned"], warm["benchmarked"], warm["profiles"]) == (0, 0, 0)
    assert warm["graphs"] == cold["graphs"] == 1
    assert warm["prepared"]["graphs"] == cold["prepared"]["graphs"] == 1


@pytest.mark.slow
def test_a_second_process_that_may_tune_finds_what_was_chosen(tmp_path):
    """On a CPU as on a card; what ran in the first is in the second neither tried nor compiled again."""
    cold, warm = (run(tmp_path, options={"max_autotune": True}) for _ in range(2))
    assert cold["fx_miss"] == 1 and cold["compilations"] > 0
    assert (warm["tuned"], warm["benchmarked"], warm["compilations"], warm["fx_miss"]) == (0, 0, 0, 0)
    assert warm["pifa"].get("factored", 0) == 0 and warm["y"] == cold["y"]


def test_both_compile_caches_hit_in_a_second_process(runs):
    assert runs["cold"]["aot_miss"] == runs["cold"]["fx_miss"] == 1
    assert (runs["warm"]["aot_hit"], runs["warm"]["aot_miss"], runs["warm"]["fx_miss"]) == (1, 0, 0)


def test_a_prepared_model_is_not_compiled_again_in_a_second_process(runs):
    cold, warm = runs["cold"]["prepared"], runs["warm"]["prepared"]
    assert cold["pifa"]["prepared"] == warm["pifa"]["prepared"] == 2
    assert cold["aot_miss"] == 1
    assert (warm["aot_hit"], warm["aot_miss"], warm["fx_miss"]) == (1, 0, 0)
    assert warm["y"] == cold["y"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: on CPU there is nothing to tune")
def test_a_second_process_tunes_nothing_again(tmp_path):
    cold, warm = (run(tmp_path, options={"max_autotune": True}, width=256, device="cuda") for _ in range(2))
    assert cold["tuned"] > 0
    assert (warm["tuned"], warm["aot_hit"], warm["fx_miss"]) == (0, 1, 0)
    assert warm["y"] == cold["y"]


def test_a_change_of_our_sources_misses_both(runs):
    assert (runs["edited"]["aot_hit"], runs["edited"]["aot_miss"]) == (0, 1)
    assert (runs["edited"]["fx_hit"], runs["edited"]["fx_miss"]) == (0, 1)


def test_the_inductor_cache_holds_no_factor_bytes(runs):
    from pifa_compile.store import Store

    store = Store(runs["folder"] / "store")
    (finished,) = store.runs()
    tensors = [t for r in finished.layers for t in store.factors(r).tensors().values() if t.numel() > 64]
    needles = [t.flatten()[start:].numpy().tobytes()[:256] for t in tensors for start in (0, t.numel() // 2)]
    files = [p for p in (runs["folder"] / "inductor").rglob("*") if p.is_file()]
    assert files
    assert not [p for p in files for needle in needles if needle in p.read_bytes()]


@pytest.fixture
def inductor_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def compile_anew(model: nn.Module, x: torch.Tensor, **options: object) -> tuple[str, torch.Tensor]:
    """Whether the compile caches know what a new compilation of the model asks for, and what it computes."""
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        y = torch.compile(model, backend="pifa", options=options)(x)
    found = {key: counters["aot_autograd"][f"autograd_cache_{key}"] for key in ("hit", "miss")}
    assert sum(found.values()) == 1
    return ("hit" if found["hit"] else "miss"), y


def test_the_size_of_the_inductor_cache_is_not_that_of_the_model(runs, inductor_cache, tmp_path):
    """Sixty-four times as many numbers: the code that is kept for them is as long."""
    model = nn.Sequential(nn.Linear(512, 1536), nn.GELU(), nn.Linear(1536, 512)).eval()
    factors = sum(r.bytes for r in pifa_compile.compress(model, Svd(density=0.6), progress=False).run.layers)
    assert compile_anew(model, torch.ones(4, 512))[0] == "miss"
    assert factors > 3_000_000
    assert cache_size(tmp_path) < cache_size(runs["folder"]) + factors / 20


def test_options_and_ranks_are_part_of_the_key_and_values_are_inputs(inductor_cache, tmp_path):
    """Of two stores with factors of the same shapes the second needs no new code, and gives its own outputs."""
    x, seen = torch.randn(4, 64), []
    for number, density in enumerate((0.6, 0.6, 0.4)):
        model = nn.Sequential(nn.Linear(64, 96), nn.Softmax(-1), nn.Linear(96, 64)).eval()
        place = tmp_path / f"store{number}"
        pifa_compile.compress(model, Svd(density=density), progress=False, store=place)
        for options in ({}, {"epilogue_fusion": False}) if number == 1 else ({}, {}):
            known, y = compile_anew(model, x, store=place, **options)
            seen.append(known)
        with torch.no_grad():
            exact = pifa_compile.restore_(pifa_compile.apply_(model, store=place)).double()(x.double())
        assert torch.allclose(y.double(), exact, atol=1e-5)
    assert seen == ["miss", "hit", "hit", "miss", "miss", "hit"]


def graphs(model: nn.Module, sizes: list[tuple[int, int]], dense: nn.Module, **settings: object) -> int:
    """How many graphs torch compiles for these batches and lengths; all outputs must be those of ``dense``."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, **settings)
    for size in sizes:
        x = torch.randn(*size, 64)
        assert torch.allclose(compiled(x).double(), dense(x.double()), atol=1e-4)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("prepared", [False, True], ids=["transparent", "prepared"])
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_all_lengths_and_batches_cost_one_recompilation(prepared, inner):
    """Torch compiles a size of one for itself, whatever the backend; we may add nothing to that."""
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64)).eval()
    pifa_compile.compress(model, Svd(density=0.6), progress=False)
    plain = pifa_compile.restore_(pifa_compile.apply_(copy.deepcopy(model)))
    dense = copy.deepcopy(plain).double()
    model = pifa_compile.apply_(model) if prepared else model
    chance = random.Random(0)
    sizes = [(2, 9), (3, 30), (8, 512), (2, 2)] + [(chance.randint(2, 8), chance.randint(2, 512)) for _ in range(30)]
    ones = [(1, 17), (1, 512), (5, 1), (8, 1), (1, 1)]
    ours = {"backend": "pifa", "options": {"inner": inner}}
    assert graphs(model, sizes, dense, **ours) == 2
    assert graphs(model, sizes, dense, dynamic=True, **ours) == 1
    assert graphs(model, sizes + ones, dense, **ours) == graphs(plain, sizes + ones, dense, backend="eager")


def test_the_source_digest_covers_every_source_and_nothing_else(tmp_path, monkeypatch):
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
