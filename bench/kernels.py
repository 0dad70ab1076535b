"""Forms of one layer in turns; arguments as of ``pifa bench kernels``."""

from __future__ import annotations

import sys

from pifa_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", "kernels", *sys.argv[1:]]))
