"""Blocks of layers through the backend; arguments as of ``pifa bench layers``."""

from __future__ import annotations

import sys

from pifa_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", "layers", *sys.argv[1:]]))
