"""Text that is on every machine, and text from a file."""

import json
import sys
from types import SimpleNamespace

import pytest

from pifa_compile import texts
from pifa_compile.errors import InputError
from pifa_compile.texts import names_dataset, read_text, standard_library_docstrings, texts_of

LONG = "A paragraph that is long enough to be taken for English text by everyone who reads it."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of a few files."""
    files = {
        "b.py": f'"""{LONG} B."""\nclass A:\n    """{LONG} A.\n\n    No."""\n    def f(self):\n        """Short."""\n',
        "a.py": f'def f():\n    """{LONG}\n    It   goes on."""\nasync def g():\n    """{LONG} B."""\n',
        "c/d.py": f'"""{LONG} D."""\n',
        "test/e.py": f'"""{LONG} E."""\n',
        "c/tests/f.py": f'"""{LONG} F."""\n',
        "site-packages/g.py": f'"""{LONG} G."""\n',
        "broken.py": "def (\n",
        "long.py": f'"""{LONG * 9}"""\n',
        "none.py": "x = 1\n",
        "readme.txt": LONG,
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "lib" / "latin.py").write_bytes(f'"""{LONG} \xe9"""'.encode("latin-1"))
    monkeypatch.setattr(texts.sysconfig, "get_path", {"stdlib": str(tmp_path / "lib")}.get)


def test_docstrings_are_first_paragraphs_each_once_in_order_of_the_files(library):
    assert standard_library_docstrings() == [f"{LONG} It goes on.", f"{LONG} B.", f"{LONG} A.", f"{LONG} D."]


def test_docstrings_have_the_length_that_is_asked_for(library):
    assert standard_library_docstrings(1, 10) == ["Short."]
    assert standard_library_docstrings(700, 800) == [LONG * 9]
    assert standard_library_docstrings(10000, 20000) == []


def test_docstrings_of_chosen_files_alone(library):
    assert standard_library_docstrings(chosen="c/d.py".__ne__) == [f"{LONG} It goes on.", f"{LONG} B.", f"{LONG} A."]
    assert standard_library_docstrings(chosen="c/d.py".__eq__) == [f"{LONG} D."]


def test_a_text_file_is_read_as_utf_8(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\n".encode())
    assert read_text(tmp_path / "a.txt") == read_text(str(tmp_path / "a.txt")) == "naïve\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read the text .*: No such file or directory"),
        (b"", "is empty; give a text of some thousand words"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe\x00", "is no UTF-8 text; convert it first"),
        (b"a\x00b", "is no text: it has zero bytes"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, problem):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_text(path)
    with pytest.raises(InputError, match="Is a directory"):
        read_text(tmp_path)


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A package ``datasets`` with the rows of one data set, and the calls that were made."""
    calls = []
    rows = [{"id": i, "text": f"Row {i}.", "note": "x"} for i in range(3)]

    def load_dataset(place, **settings):
        calls.append((place, settings))
        if place != "someone/rows":
            raise FileNotFoundError(f"Dataset '{place}' doesn't exist on the Hub\nor cannot be accessed")
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_dataset_is_read_by_its_name(hub):
    assert read_text("datasets:someone/rows") == "Row 0.\n\nRow 1.\n\nRow 2."
    assert read_text("datasets:someone/rows,config=small,split=test,column=note,revision=main") == "x\n\nx\n\nx"
    assert hub == [
        ("someone/rows", {"split": "train", "streaming": True}),
        ("someone/rows", {"name": "small", "split": "test", "revision": "main", "streaming": True}),
    ]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("datasets:nobody/nothing", "cannot read datasets:nobody/nothing: Dataset 'nobody/nothing' doesn't exist"),
        ("datasets:someone/rows,spilt=test", "cannot read spilt='test'; write KEY=VALUE; known .*did you mean 'split'"),
        ("datasets:someone/rows,split", "cannot read split=''"),
        ("datasets:someone/rows,column=id", "the column 'id' holds no text; the columns are id, text, note"),
        ("datasets:someone/rows,column=no", "the column 'no' holds no text"),
    ],
)
def test_a_dataset_that_cannot_be_read(hub, name, problem):
    with pytest.raises(InputError, match=problem):
        read_text(name)


def test_the_package_datasets_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets; .*: pip install 'pifa-compile\[calibrate\]'"):
        read_text("datasets:someone/rows")


def test_what_names_a_dataset():
    assert names_dataset("datasets:wikitext") and names_dataset("datasets:a/b,split=test")
    others = ["datasets:", "datasets: collections of rows.", "datasets:a\nb", "a/datasets:b", None, ["datasets:a"]]
    assert not any(names_dataset(other) for other in others)


def test_the_text_column_is_found_or_asked_for(monkeypatch):
    assert texts_of([{"label": 1, "sentence": "a"}, {"label": 2, "sentence": "b"}]) == ["a", "b"]
    assert texts_of([{"text": ["a", "b"], "n": [1, 2]}, {"text": ["c"], "n": [3]}]) == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"which column is the text\? Give column=...; the columns are a, b"):
        texts_of([{"a": "x", "b": "y"}])
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 10)
    assert texts_of({"text": "four"} for _ in iter(int, 1)) == ["four"] * 3, "an endless stream is not read to its end"


def test_a_file_of_rows_is_read_by_the_real_package(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra 'calibrate' is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"Row {i}.", "n": i}) + "\n" for i in range(4)))
    assert read_text(f"datasets:json,data_files={path}") == "Row 0.\n\nRow 1.\n\nRow 2.\n\nRow 3."
    with pytest.raises(InputError, match="cannot read datasets:json"):
        read_text(f"datasets:json,data_files={path},split=nothing")
