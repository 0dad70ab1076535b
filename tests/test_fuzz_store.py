"""Random attacks on a store, a few of those that ``fuzz_store.py`` makes by hand for as long as one likes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["damage", "hostile"])
@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_spoilt_store_serves_what_is_right_or_says_what_is_wrong(kind, rounds):
    first = 0 if rounds == 30 else 100_000
    command = [sys.executable, str(HERE / "fuzz_store.py"), "--kind", kind]
    command += ["--rounds", str(rounds), "--first", str(first)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rounds} rounds" in done.stdout
