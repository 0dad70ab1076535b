"""What README.md shows runs: its Python in the order of the page, its commands as the command line reads them."""

from __future__ import annotations

import copy
import re
import shlex
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import SMALL, byte_tokenizer

from pifa_compile import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line.partition("  #")[0].strip() for language, code in BLOCKS if not language for line in code.splitlines()]


def commands() -> list[str]:
    """Every ``pifa`` command of the page; several may stand in one line."""
    inline = re.findall(r"`(pifa [a-z-]+ [^`]*)`", TEXT)
    return [part for line in [*SHELL, *inline] for part in re.split(r"\s{2,}", line) if part.startswith("pifa ")]


def test_there_is_something_to_check():
    assert len(PYTHON) >= 4 and len(commands()) >= 10
    assert {"make demo", "make test"} <= set(SHELL)


@pytest.mark.filterwarnings("ignore:pifa. the first call has")
def test_the_python_of_the_page_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    """The blocks share their names, as in one session; what a block takes for given is a small random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, code in enumerate(PYTHON):
        if "tokenizer" in code and "tokenizer" not in names:
            names["tokenizer"] = byte_tokenizer()
            names["model"] = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=256)).eval()
            names["texts"] = [TEXT]
            names["dense"] = copy.deepcopy(names["model"])
        if "peft" in code and find_spec("peft") is None:  # where the extra 'tune' is not installed
            continue
        exec(compile(code, f"README.md, Python block {number + 1}", "exec"), names)
    assert torch.is_tensor(names["y"]) and names["y"].shape == (8, 256)
    assert "2 of 2" in capsys.readouterr().out  # the dry run that is printed
    modules = {type(module).__name__ for module in names["small"].modules()}
    assert "PifaLinear" in modules


def test_the_six_lines_are_six():
    lines = PYTHON[0].splitlines()
    assert sum(bool(line.strip()) and not line.startswith(("import", "with")) for line in lines) <= 6


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_program_knows(command):
    """[optional parts] are tried with and without; WORDS in capitals stand for values."""
    parts = re.split(r"\[([^\]]*)\]", command)
    for chosen in product((True, False), repeat=len(parts) // 2):
        words = "".join(part if i % 2 == 0 or chosen[i // 2] else "" for i, part in enumerate(parts))
        arguments = shlex.split(words)[1:]
        options = cli._parser().parse_args([_value(word) for word in arguments])
        assert callable(options.command)


def _value(word: str) -> str:
    return {"FIELD=VALUE": "density=0.5"}.get(word, word)


@pytest.mark.parametrize("target", sorted({line.split()[1] for line in SHELL if line.startswith("make ")}))
def test_every_target_of_make_is_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_named_is_there():
    named = set(re.findall(r"`((?:bench|passes|kernels|tests|pifa_compile|examples)/[\w./-]*)`", TEXT))
    named |= set(re.findall(r"`((?:bench|passes|kernels|pifa_compile)/[\w./]+\.(?:py|sh))", TEXT))
    missing = {name for name in named if not (ROOT / name).exists()}
    assert named and not missing
