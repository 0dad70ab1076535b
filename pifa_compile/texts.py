"""Text that is on every machine, in a file or in a dataset: what demos, calibrations and evaluations read."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pifa_compile.errors import InputError, did_you_mean

STANDARD_LIBRARY = "docstrings of the Python standard library"
#: What the name of a Hugging Face dataset begins with.
PREFIX = "datasets:"
#: No more of a dataset is read: far more than calibrations and evaluations use.
MOST_CHARACTERS = 4_000_000
_SETTINGS = ("config", "split", "column", "revision", "data_files")


def standard_library_docstrings(
    shortest: int = 60, longest: int = 600, chosen: Callable[[str], bool] | None = None
) -> list[str]:
    """First paragraphs of the docstrings of the standard library's own modules, each once, in order of the file names.

    shortest, longest  in characters; a paragraph outside is left out. Tests of the library are not read.
    chosen             whether to read a file, by its path inside of the library; default: all
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder)
        if {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(inside.parts):
            continue
        if chosen is None or chosen(inside.as_posix()):
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


def read_text(source: Path | str) -> str:
    """The text of a UTF-8 file, or of a dataset that is named ``datasets:...``, see ``read_dataset``.

    Raises InputError for one that is missing, empty or no text.
    """
    text = read_dataset(str(source)) if names_dataset(source) else _read_file(source)
    if not text.strip():
        raise InputError(f"{source} is empty; give a text of some thousand words")
    return text


def _read_file(path: Path | str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no UTF-8 text; convert it first") from None
    if "\0" in text:
        raise InputError(f"{path} is no text: it has zero bytes")
    return text


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


def names_dataset(source: object) -> bool:
    """Whether a word is ``datasets:...``; nothing with a space in it is."""
    word = str(source) if isinstance(source, str | Path) else ""
    return word.startswith(PREFIX) and len(word) > len(PREFIX) and not any(c.isspace() for c in word)


def read_dataset(name: str) -> str:
    """The texts of a Hugging Face dataset, with empty lines between them, MOST_CHARACTERS at most; read as a stream.

    name  ``datasets:NAME`` and settings after commas: config, split (default: train), column (default: text, else the
          only one of strings), revision, data_files. ``datasets:json,data_files=my.jsonl`` is a file of one's own.

    Raises InputError for a dataset or setting that there is not, and where the package datasets is missing.
    """
    place, *words = name.removeprefix(PREFIX).split(",")
    settings = {key: value for key, _, value in (word.partition("=") for word in words)}
    for key, value in settings.items():
        if key not in _SETTINGS or not value:
            known = f"known settings: {', '.join(_SETTINGS)}{did_you_mean(key, _SETTINGS)}"
            raise InputError(f"{name}: cannot read {key}={value!r}; write KEY=VALUE; {known}")
    column = settings.pop("column", None)
    keywords = {"name" if key == "config" else key: value for key, value in settings.items()}
    try:
        from datasets import load_dataset
    except ImportError as error:
        cure = "install it with: pip install 'pifa-compile[calibrate]'"
        raise InputError(f"{name} needs the package datasets; {cure}") from error
    try:
        rows = load_dataset(place, **{"split": "train"} | keywords, streaming=True)
        return "\n\n".join(texts_of(rows, column))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read {name}: {first}") from error


def texts_of(rows: Iterable[Mapping[str, Any]], column: str | None = None) -> list[str]:
    """The texts of a dataset's rows (or of batches of rows), MOST_CHARACTERS at most.

    column  which; default: the column named text, else the only one that holds strings; InputError if there is none
    """
    found: list[str] = []
    size = 0
    for row in rows:
        column = column or _text_column(row)
        value = row.get(column)
        if value is None or not _is_text(value):
            raise InputError(f"the column {column!r} holds no text; the columns are {', '.join(map(str, row))}")
        texts = [value] if isinstance(value, str) else list(value)
        found += texts
        size += sum(map(len, texts))
        if size >= MOST_CHARACTERS:
            break
    return found


def _text_column(row: Mapping[str, Any]) -> str:
    columns = [key for key, value in row.items() if _is_text(value)]
    if "text" in columns or len(columns) == 1:
        return "text" if "text" in columns else columns[0]
    raise InputError(f"which column is the text? Give column=...; the columns are {', '.join(map(str, row))}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))
