"""Ctrl-C at every stage of a command: one line, no traceback, and the same command goes on from there."""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import pifa_compile
from pifa_compile import cli
from pifa_compile.store import Store

#: Runs the command with an interrupt, as the terminal sends it to all its processes, at the n-th call of a function.
PROGRAM = """
import os, pkgutil, signal, sys
place, count, *arguments = sys.argv[1:]
module, name = place.split(":")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control has it ignored
from pifa_compile import cli
if module != "none":
    classes, _, name = name.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{classes}")
    function, calls = getattr(owner, name), [0]
    def interrupted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(count):
            os.killpg(0, signal.SIGINT)
        return function(*args, **kwargs)
    setattr(owner, name, interrupted)
code = cli.main(arguments)
if "torch._dynamo" in sys.modules:
    with open(os.environ["COUNTED"], "w") as file:
        file.write(str(sys.modules["torch._dynamo"].utils.counters["pifa"]["factored"]))
sys.exit(code)
"""


def run(folder: Path, place: str, count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, interrupted at the ``count``-th call of ``module:function``; "none:" lets it be.

    folder  for what Inductor compiles: what it finds compiled already, it does not compile
    """
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    path["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    path["COUNTED"] = str(folder / "counted")
    command = [sys.executable, "-c", PROGRAM, place, str(count), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | path, capture_output=True, text=True, start_new_session=True, timeout=300
    )


GOES_ON = "layers that were finished are kept, and the same command goes on from there"
NOT_WRITTEN = "the model was not written"
NOTHING = "nothing was kept"


def interrupted(done: subprocess.CompletedProcess[str], what_is_left: str = GOES_ON) -> bool:
    assert done.returncode == cli.INTERRUPTED, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"pifa: error: interrupted; {what_is_left}"
    return True


def leftovers(folder: Path) -> list[Path]:
    """Half-written files; those of a walk under way, which it goes on with, have a folder of their own."""
    return [p for p in folder.rglob(".*") if "inductor" not in p.parts and p.parent.name not in ("scratch", "locks")]


def with_text(folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("".join(f"A text of {number} words, again and again. " for number in range(400)))
    return text


def test_compress_goes_on_where_it_was_interrupted(language_folder, tmp_path):
    """The rest is done in this process, which is quicker than in another."""
    arguments = ["compress", language_folder, "--method", "svd", "--density", 0.5, "--store", tmp_path / "kept"]
    assert interrupted(run(tmp_path, "pifa_compile.store.objects:_save", 4, *arguments))
    assert leftovers(tmp_path) == []
    store = Store(tmp_path / "kept")
    (begun,) = store.runs()
    assert len(begun.layers) == 3 and not begun.complete
    assert cli.main([str(word) for word in arguments]) == cli.DONE
    (finished,) = store.runs()
    assert counters["pifa"]["factored"] == finished.totals.pifa - 3
    assert finished.complete and store.verify(finished.header.run_id) == []


STAGES = [
    ("pifa_compile.loading:load_model", 1, 0),
    ("pifa_compile.compression.calibrated:find_plan", 1, 0),
    ("pifa_compile.compression.calibrated:capture", 1, 0),
    ("pifa_compile.compression.gradients:_backward", 2, 0),
    ("pifa_compile.compression.calibrated:plan_ranks", 1, 0),
    ("pifa_compile.compression.solving:TwoFlows", 2, None),
    ("pifa_compile.compression.solving:whiten", 3, None),
    ("pifa_compile.compression.solving:closed_form", 3, 2),
    ("pifa_compile.compression.layer:factorize", 3, 2),
    ("pifa_compile.store.objects:_save", 4, 3),
    ("pifa_compile.store.files:sync", 9, None),
    ("pifa_compile.store.writer:RunWriter.add", 3, None),
    ("pifa_compile.store.writer:RunWriter.finish", 1, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "count", "kept"), STAGES)
def test_calibrated_compression(language_folder, tmp_path, place, count, kept):
    how = ("--text", with_text(tmp_path), "--density", 0.5, "--set", "window_length=64", "--set", "rank_multiple=1")
    arguments = ("compress", language_folder, *how, "--store", tmp_path / "kept")
    assert interrupted(run(tmp_path, place, count, *arguments))
    assert leftovers(tmp_path) == []
    store = Store(tmp_path / "kept")
    finished = sum(record.object is not None for begun in store.runs() for record in begun.layers)
    assert finished == kept or kept is None
    done = run(tmp_path, "none:", 0, *arguments)
    assert done.returncode == 0, done.stderr
    (made,) = store.runs()
    objects = sum(record.object is not None for record in made.layers)
    assert int((tmp_path / "counted").read_text()) == objects - finished
    assert made.complete and store.verify(made.header.run_id) == []
    assert not list((tmp_path / "kept").rglob(".tmp*"))


@pytest.mark.slow
def test_text_that_a_model_samples(language_folder, tmp_path):
    how = ("--density", 0.5, "--set", "windows=4", "--set", "window_length=32")
    arguments = ("compress", language_folder, *how, "--store", tmp_path / "kept")
    assert interrupted(run(tmp_path, "pifa_compile.compression.calibration:sample_windows", 1, *arguments))
    assert run(tmp_path, "none:", 0, *arguments).returncode == 0


@pytest.fixture(scope="module")
def compressed(language_folder, tmp_path_factory):
    """A folder with a store in it that has one run of the small Llama."""
    folder = tmp_path_factory.mktemp("compressed")
    how = ["--method", "svd", "--density", "0.5", "--store", str(folder / "kept")]
    assert cli.main(["compress", str(language_folder), *how]) == cli.DONE
    return folder


WRITERS = [
    ("export", "pifa_compile.prepare:apply_run_", 1),
    ("export", "transformers.modeling_utils:safe_save_file", 1),
    ("export", "shutil:copyfile", 1),
    ("program", "torch.export:export", 1),
    ("program", "torch.export:save", 1),
    ("tune", "pifa_compile.loading:load_model", 2),
    ("tune", "pifa_compile.tuning:train", 1),
    ("tune", "shutil:copyfile", 1),
    ("import", "pifa_compile.importing:factorize", 2),
    ("import", "shutil:copyfile", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "place", "count"), WRITERS)
def test_what_writes_a_model_writes_all_of_it_or_nothing(compressed, language_folder, tmp_path, command, place, count):
    out, store = tmp_path / ("out.pt2" if command == "program" else "out"), ("--store", compressed / "kept")
    arguments = {
        "export": ("export", out, "--model", language_folder, *store),
        "program": ("export", out, "--format", "pt2", "--model", language_folder, *store),
        "tune": ("tune", language_folder, "--out", out, "--text", with_text(tmp_path), "--steps", 1, *store),
        "import": ("import", pairs_of(language_folder, tmp_path), "--model", language_folder, "--out", out),
    }[command]
    before = set(tmp_path.iterdir())
    assert interrupted(run(tmp_path, place, count, *arguments), NOT_WRITTEN)
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"inductor", "counted"}
    done = run(tmp_path, "none:", 0, *arguments)
    assert done.returncode == 0 and out.exists(), done.stderr


def pairs_of(folder: Path, place: Path) -> Path:
    """A checkpoint with a pair in the place of one layer in each block."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("up_proj.weight")]:
        u, s, v = torch.linalg.svd(state.pop(name), full_matrices=False)
        stem = name.removesuffix("up_proj.weight")
        state[f"{stem}up_u_proj.weight"] = (u[:, :8] * s[:8]).contiguous()
        state[f"{stem}up_v_proj.weight"] = v[:8].contiguous()
    save_file(state, place / "pairs.safetensors")
    return place / "pairs.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count"),
    [(f"pifa_compile.quality:{name}", 1) for name in ("evaluate", "with_run", "keep_figures")],
)
def test_eval(compressed, language_folder, tmp_path, place, count):
    arguments = ("eval", language_folder, "--text", with_text(tmp_path), "--windows", 4, "--store", compressed / "kept")
    assert interrupted(run(tmp_path, place, count, *arguments), NOTHING)
    assert leftovers(compressed) == []
    assert run(tmp_path, "none:", 0, *arguments).returncode == 0


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


# --- a first call ----------------------------------------------------------------------------------------------------

FIRST_CALL = [
    ("pifa_compile.compression.observe:CapturedGraph.input_moments", 1, 0),
    ("pifa_compile.compression.observe:CapturedGraph.output_moments", 1, 0),
    ("pifa_compile.compression.first_call:whiten", 1, 0),
    ("pifa_compile.compression.first_call:closed_form", 2, 1),
    ("pifa_compile.compression.layer:factorize", 2, 1),
    ("pifa_compile.store.objects:_save", 2, 1),
    ("pifa_compile.store.writer:RunWriter.finish", 1, 2),
    ("pifa_compile.backend:run_passes", 1, 0),
    ("pifa_compile.store.cache:factors_from_tensors", 1, 2),
]


@pytest.mark.parametrize(("place", "count", "kept"), FIRST_CALL)
def test_a_first_call_that_is_interrupted_says_so_and_the_next_goes_on(store, monkeypatch, place, count, kept):
    module, name = place.split(":")
    classes, _, name = name.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{classes}")
    function, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    compiled = torch.compile(model, backend="pifa", options={"density": 0.6, "inner": "eager"})
    x, before = torch.randn(200, 32), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, torch.no_grad(), pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, signalled)
            compiled(x)
    finally:
        signal.signal(signal.SIGINT, before)
    assert counters["pifa"]["factored"] == kept + (place == "pifa_compile.store.objects:_save")
    assert leftovers(store.root) == []
    counters.clear()
    with torch.no_grad():
        y = compiled(x)
    assert counters["pifa"]["factored"] == 2 - kept and counters["pifa"]["replaced"] == 2
    (made,) = store.runs()
    assert made.complete and store.verify(made.run_id) == []
    exact = pifa_compile.restore_(pifa_compile.apply_(model))(x)
    assert torch.allclose(y, exact, atol=1e-5)
