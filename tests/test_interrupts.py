"""Ctrl-C at every stage of a command: one line, no traceback, and the same command goes on from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pifa_compile import cli
from pifa_compile.store import Store

#: Runs the command with an interrupt, as the terminal sends it to all its processes, at the n-th call of a function.
PROGRAM = """
import importlib, os, signal, sys
place, count, *arguments = sys.argv[1:]
module, name = place.split(":")
from pifa_compile import cli
if module != "none":
    owner = importlib.import_module(module)
    function, calls = getattr(owner, name), [0]
    def interrupted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(count):
            os.killpg(0, signal.SIGINT)
        return function(*args, **kwargs)
    setattr(owner, name, interrupted)
sys.exit(cli.main(arguments))
"""


def run(folder: Path, place: str, count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, interrupted at the ``count``-th call of ``module:function``; "none:" lets it be.

    folder  for what Inductor compiles: what it finds compiled already, it does not compile
    """
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    path["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    command = [sys.executable, "-c", PROGRAM, place, str(count), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, start_new_session=True, timeout=300
    )


def interrupted(done: subprocess.CompletedProcess[str]) -> bool:
    assert done.returncode == cli.INTERRUPTED, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("pifa: error: interrupted; layers that were finished are kept")
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count", "kept"),
    [
        ("pifa_compile.loading:load_model", 1, 0),
        ("pifa_compile.compression.layer:factorize", 3, 2),
        ("pifa_compile.store.objects:_save", 4, 3),
    ],
)
def test_compress(language_folder, tmp_path, place, count, kept):
    arguments = ("compress", language_folder, "--method", "svd", "--density", 0.5, "--store", tmp_path / "kept")
    assert interrupted(run(tmp_path, place, count, *arguments))
    store = Store(tmp_path / "kept")
    runs = store.runs()
    assert sum(record.object is not None for r in runs for record in r.layers) == kept
    done = run(tmp_path, "none:", 0, *arguments)
    assert done.returncode == 0, done.stderr
    (finished,) = store.runs()
    assert finished.complete and store.verify(finished.header.run_id) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("pifa_compile.demo:_task", 1),
        ("torch._inductor.compile_fx:fx_codegen_and_compile", 1),
        ("pifa_compile.compression.layer:factorize", 2),
        ("pifa_compile.demo:_times", 1),
    ],
)
def test_demo(language_folder, tmp_path, place, count):
    text = tmp_path / "text.txt"
    text.write_text("A text of a few words, again and again. " * 400)
    arguments = ("demo", "--model", language_folder, "--text", text, "--densities", 0.5, "--out", tmp_path / "out")
    assert interrupted(run(tmp_path, place, count, *arguments))
