"""Text that is on every machine, and text from a file."""

import pytest

from pifa_compile import texts
from pifa_compile.errors import InputError
from pifa_compile.texts import read_text, standard_library_docstrings

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
