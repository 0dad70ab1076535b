"""What is begun early of Inductor's look at the processor: the programs it would compile itself, each of them once."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import counting_compiler

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="Inductor compiles nothing to know other processors"
)

SCRIPT = """
import json, sys
from torch._inductor import cpu_vec_isa
from pifa_compile import _torch

how = json.loads(sys.argv[1])
begun = _torch.begin_isa_checks() if how["begin"] else []
if how["look"]:
    print(json.dumps([f"{isa} {isa.build_arch_flags()}" for isa in cpu_vec_isa.valid_vec_isa_list()]))
else:
    print(json.dumps([len(begun)]))
"""


def looked(folder: Path, *, begin: bool, look: bool, compiles: bool = True) -> tuple[list, list[str]]:
    """What the script prints, and the sources and flags that the compiler was called with."""
    folder.mkdir(exist_ok=True)
    compiler, calls = counting_compiler(folder, compiles=compiles)
    environment = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    command = [sys.executable, "-c", SCRIPT, json.dumps({"begin": begin, "look": look})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), sorted(line.replace(str(folder), "") for line in calls())


def test_the_programs_begun_are_those_of_inductor(tmp_path):
    """With a compiler that fails: then Inductor tries the first program of each set of instructions, and no more."""
    waiting, begun = looked(tmp_path / "begun", begin=True, look=False, compiles=False)
    _, own = looked(tmp_path / "own", begin=False, look=True, compiles=False)
    assert waiting == [0] and begun and begun == own


def test_what_is_begun_is_compiled_once_and_changes_no_flags(tmp_path):
    flags, begun = looked(tmp_path / "begun", begin=True, look=True)
    assert begun and len(set(begun)) == len(begun)
    assert (flags, begun) == looked(tmp_path / "own", begin=False, look=True)
    waiting, again = looked(tmp_path / "begun", begin=True, look=False)
    assert (waiting, again) == ([1], [])  # in a warm start: one look, which compiles nothing
