"""English and other text that is on every machine or in a file: what demos and calibrations read."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from pifa_compile.errors import InputError

STANDARD_LIBRARY = "docstrings of the Python standard library"


def standard_library_docstrings(shortest: int = 60, longest: int = 600) -> list[str]:
    """First paragraphs of the docstrings of the standard library's own modules, each once, in order of the file names.

    shortest, longest  in characters; a paragraph outside is left out. Tests of the library are not read.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for file in sorted(folder.rglob("*.py")):
        if not {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(file.relative_to(folder).parts):
            found |= dict.fromkeys(p for p in _paragraphs(file) if shortest <= len(p) <= longest)
    return list(found)


def _paragraphs(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").split("\n\n")[0]
            yield " ".join(text.split())


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file; raises InputError for one that is missing, empty or no text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text; convert it first") from None
    if not text.strip():
        raise InputError(f"{path} is empty; give a text of some thousand words")
    return text
