"""The bound that is told before a walk: what it says for known shapes, and that a walk stays below it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pifa_compile.compression import calibrated, compress, memory
from pifa_compile.compression.memory import BUDGET, GroupSize, WalkSize, bound, choose_form
from pifa_compile.recipes import Mpifa, SvdLlm

LLAMA_7B = [
    GroupSize(4096, (4096, 4096, 4096)),
    GroupSize(4096, (4096,)),
    GroupSize(4096, (11008, 11008)),
    GroupSize(11008, (4096,)),
]


def seven_billion(tokens=16 * 2048, itemsize=2, **settings):
    facts = {"tokens": tokens, "batch_tokens": 2048, "width": 4096, "block_bytes": 202_383_360 * itemsize}
    return WalkSize([LLAMA_7B] * 32, [], itemsize=itemsize, vocabulary=32000, **facts | settings)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [2048, 16 * 2048, 128 * 2048])
def test_a_model_of_seven_billion_stays_below_six_gigabytes(tokens, itemsize):
    size = seven_billion(tokens, itemsize)
    found = bound(size, "full")
    assert choose_form(size, "full") == "full"
    assert 4 << 30 < found.beside <= BUDGET == 6 << 30
    assert found.flows == 3 * tokens * 4096 * itemsize, "both flows, and one while a block is run"
    assert found.moments["full"] == 8 * (5 * 4096**2 + 2 * 11008**2)
    assert found.moments["diagonal"] == 8 * (5 * 4096 + 2 * 11008)
    assert found.total == found.block + found.flows + found.beside


def test_the_form_is_the_diagonal_one_where_full_moments_do_not_fit():
    size = WalkSize([[GroupSize(4096, (28672, 28672))]] * 80, [], 16384, 2048, 4096, 2, 1 << 30)
    assert bound(size, "full").beside > BUDGET
    assert [choose_form(size, form) for form in ("full", "diagonal")] == ["diagonal", "diagonal"]
    assert bound(size, "diagonal").beside < bound(size, "full").beside
    many_inputs = WalkSize([[GroupSize(28672, (4096,))]] * 80, [], 16384, 2048, 8192, 2, 1 << 30)
    assert bound(many_inputs, "full").beside > BUDGET
    assert choose_form(many_inputs, "full") == "full", "its diagonal would not help"
    at_once = seven_billion(blockwise=False)
    assert bound(at_once, "full").moments["full"] == 32 * bound(seven_billion(), "full").moments["full"]
    assert choose_form(at_once, "full") == "diagonal"


def test_what_a_recipe_does_not_need_is_not_counted():
    without = seven_billion(gradients=False, prices=False, weighted=False)
    found = bound(without, "none")
    assert set(found.stages) == {"solver"}
    assert (found.moments, found.disk, found.form) == ({}, 0, "none")
    assert str(found).startswith("memory: at most ")
    assert "\n" not in str(found)
    assert bound(seven_billion(two_flows=False, gradients=False, weighted=False), "none").flows == 2 * without.flow


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | {"vocab_size": 40} | settings)).eval()


def test_the_bound_and_the_form_are_told_and_written_down(store, capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="pifa_compile")
    text = torch.randint(0, 40, (8, 12))
    run = compress(llama(), Mpifa(density=0.5, rank_multiple=1), text=text, store=store).run
    told = capsys.readouterr().err
    assert "memory: at most" in told
    assert "gradient moments: full (GiB at a time: full " in told
    assert "memory: at most" in caplog.text
    assert {r.details["weighting"] for r in run.layers if r.object} == {"full"}
    monkeypatch.setattr(memory, "BUDGET", 1000)
    monkeypatch.setattr(calibrated, "BUDGET", 1000)
    recipe = Mpifa(density=0.4, rank_multiple=1)
    run = compress(llama(), recipe, text=text, store=store, progress=False).run
    assert "the diagonal ones are used" in caplog.text
    assert {r.details["weighting"] for r in run.layers if r.object} == {"diagonal"}
    assert "memory" not in capsys.readouterr().err.split("memory: at most")[0]
    run = compress(llama(), SvdLlm(density=0.5, rank_multiple=1), text=text, store=store, progress=False).run
    assert {r.details["weighting"] for r in run.layers if r.object} == {"none"}


# --- measured --------------------------------------------------------------------------------------------------------


def peak_beside(root, settings, length):
    """In a process of its own: bytes that a walk needed at most, and what was told."""
    found = []
    real = calibrated.bound
    calibrated.bound = lambda *given: found.append(real(*given)) or found[-1]
    text = torch.randint(0, 40, (34, length))
    compress(llama(), Mpifa(density=0.5), text=text[:, :16], store=root, progress=False)  # imports, thread pools
    model = llama(hidden_size=128, intermediate_size=1024)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    compress(model, Mpifa(density=0.5, **settings), text=text, store=root, progress=False)
    print(json.dumps({"peak": _status("VmHWM") - before, "told": found[-1].total, "beside": found[-1].beside}))


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of resident memory to reset")
@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 24),  # fewer tokens than the widest layer has inputs
        ({"weighting": "none", "allocation": "uniform"}, 128),
    ],
)
def test_a_walk_stays_below_the_bound_and_not_far(tmp_path, settings, length):
    """Within a factor of 2.5."""
    code = f"import runpy; runpy.run_path({__file__!r})['peak_beside']({str(tmp_path)!r}, {settings!r}, {length})"
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    path["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # what is freed goes back at once, as it does anyway for large matrices
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["peak"] <= found["told"], found
    assert found["told"] <= 2.5 * found["peak"], found
