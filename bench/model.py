"""A model end to end; arguments as of ``pifa bench model``."""

from __future__ import annotations

import sys

from pifa_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", "model", *sys.argv[1:]]))
