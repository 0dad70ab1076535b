"""A run as a picture."""

from __future__ import annotations

import sys

import pytest
from torch import nn

import pifa_compile
from pifa_compile import Svd
from pifa_compile.cli import main
from pifa_compile.errors import InputError
from pifa_compile.run_plot import cells, plot_run


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pairs = [{"up": nn.Linear(24, 36), "down": nn.Linear(36, 24)} for _ in range(2)]
        self.blocks = nn.ModuleList(nn.ModuleDict(pair) for pair in pairs)
        self.head = nn.Linear(24, 8)


def run_of(model, recipe, store):
    return store.run(pifa_compile.compress(model, recipe, store=store, progress=False).run_id)


def test_cells_are_kinds_and_blocks(store):
    run = run_of(Blocks(), Svd(density=0.6, rank_multiple=1), store)
    kinds, blocks, found = cells(run)
    assert kinds == ["up", "down"] and blocks == ["blocks 0", "blocks 1"] and len(found) == 4
    assert found["up", "blocks 1"].name == "blocks.1.up"


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_every_format(ending, store, tmp_path):
    pytest.importorskip("matplotlib")
    run = run_of(Blocks(), Svd(density=0.6, rank_multiple=1), store)
    content = plot_run(run, tmp_path / f"run.{ending}").read_bytes()
    assert content[:5] in {b"\x89PNG\r", b"<?xml", b"%PDF-"} and len(content) > 5000


def test_the_command_draws_and_says_so(store, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = run_of(Blocks(), Svd(density=0.6, rank_multiple=1), store)
    assert main(["inspect", run.run_id, "--plot", str(tmp_path / "run.svg")]) == 0
    assert f"plot: {tmp_path / 'run.svg'}" in capsys.readouterr().out and (tmp_path / "run.svg").is_file()


def test_a_picture_is_of_one_run(store, tmp_path, capsys):
    run_of(Blocks(), Svd(density=0.6, rank_multiple=1), store)
    assert main(["inspect", "--plot", str(tmp_path / "run.svg")]) == 2
    assert "--plot is the picture of one run; name the run" in capsys.readouterr().err


def test_what_cannot_be_drawn(store, tmp_path, monkeypatch):
    run = run_of(Blocks(), Svd(density=0.6, rank_multiple=1), store)
    with pytest.raises(InputError, match=r"must end in .png, .svg, .pdf"):
        plot_run(run, tmp_path / "run.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pifa-compile\[plot\]"):
        plot_run(run, tmp_path / "run.png")
    monkeypatch.undo()
    head = nn.ModuleDict({"head": nn.Linear(24, 36)})
    with pytest.raises(InputError, match="no layers in numbered blocks"):
        plot_run(run_of(head, Svd(density=0.5, rank_multiple=1), store), tmp_path / "run.png")
