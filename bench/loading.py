"""Seconds and peak memory of loading a model: dense, exported with factors, and from the store.

    python bench/loading.py [MODEL] [--density 0.55 --layers 8 --width 2048 --out FILE]

MODEL is a folder; without one, a random Llama in bfloat16 is made. Its factors are random too, which changes no size.
Each load is in a process of its own, after its imports; the peak is that of resident memory above what there was
before, which counts pages of mapped files. transformers maps a file and reads nothing of it, so every tensor
is read once, as in a first call. The least that a load can take is the bytes of what it loads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pifa_compile
from pifa_compile.bench.factors import put_random_factors
from pifa_compile.bench.report import Report
from pifa_compile.loading import load_model
from pifa_compile.prepare import apply_run_
from pifa_compile.store import Store

COLUMNS = ("model", "load", "MB of tensors", "MB peak", "s")
MB = 1e6


def dense(folder: str) -> nn.Module:
    """transformers alone."""
    return load_model(folder, need_tokenizer=False)[0]


def exported(folder: str) -> nn.Module:
    """A folder of ``pifa_compile.export``, by transformers."""
    return load_model(folder, need_tokenizer=False)[0]


def from_store(folder: str, run: str, store: str) -> nn.Module:
    """The dense model's folder and the store; every dense weight is read once to see that it is the right one."""
    return pifa_compile.load(folder, run=run, store=store)


LOADS: dict[str, Callable[..., nn.Module]] = {"dense": dense, "exported": exported, "from the store": from_store}


def measured(load: str, *arguments: str) -> dict[str, float]:
    """Seconds, megabytes of tensors and peak megabytes of one load, in this process."""
    import transformers  # noqa: F401  # both take seconds and memory that are not the question
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begun = time.perf_counter()
    model = LOADS[load](*arguments)
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    for t in (*model.parameters(), *model.buffers()):
        t.view(torch.uint8).max()  # what is mapped is in memory once it is read
    seconds = time.perf_counter() - begun
    return {"s": seconds, "MB of tensors": sum(held.values()) / MB, "MB peak": (_status("VmHWM") - before) / MB}


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def rows_of(folder: Path, name: str, density: float, work: Path) -> list[dict[str, Any]]:
    """A row per way of loading the model in ``folder``."""
    model, _ = load_model(folder, need_tokenizer=False)
    store = Store(work / "store")
    put_random_factors(model, density, store)
    run = apply_run_(model, store=store)
    pifa_compile.export(model, work / "exported")
    del model
    arguments = {
        "dense": (str(folder),),
        "exported": (str(work / "exported"),),
        "from the store": (str(folder), run.header.run_id, str(store.root)),
    }
    return [{"model": name, "load": load, "density": density} | _in_child(load, arguments[load]) for load in LOADS]


def _in_child(load: str, arguments: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", load, *arguments]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading {load} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def random_llama(folder: Path, layers: int, width: int) -> Path:
    """A random Llama in bfloat16, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=width // 64, vocab_size=8192)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--density", type=float, default=0.55)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = Report("loading, each in a process of its own", COLUMNS)
    with tempfile.TemporaryDirectory() as work:
        folder = options.model or random_llama(Path(work) / "dense", options.layers, options.width)
        name = options.model.name if options.model else f"random Llama, {options.layers} x {options.width}"
        report.rows = rows_of(folder, name, options.density, Path(work))
    print(report)
    if options.out:
        report.save(options.out)
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured(*sys.argv[2:])))
    else:
        main()
