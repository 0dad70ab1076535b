"""The identity of this package's sources, for the key of the compile caches, which do not know them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

SOURCES = (".py", ".jinja", ".json", ".cpp", ".h")


@functools.cache
def source_digest() -> str:
    """A digest of the package's sources and tables: an edited pass, lowering or tile must not be served old code."""
    package = Path(__file__).parent
    folders = (package, package / "passes", package / "kernels")  # rglob does not follow the two links of a source tree
    files = {p.relative_to(package): p for folder in folders for p in folder.rglob("*") if p.suffix in SOURCES}
    hasher = hashlib.sha256()
    for relative, path in sorted(files.items()):
        hasher.update(f"{relative}\n".encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]


def cache_tag() -> str:
    """What is added to torch.compiler.config.cache_key_tag."""
    return f";pifa {source_digest()}"
