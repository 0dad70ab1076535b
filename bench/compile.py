"""How long compiling takes, cold and warm; arguments as of ``pifa bench compile``."""

from __future__ import annotations

import sys

from pifa_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", "compile", *sys.argv[1:]]))
