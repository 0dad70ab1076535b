"""Pages that people open in a browser: one file each, with style, script and data, that refers to nothing outside.

A page is a template of its own beside the module that makes its data, with three marks: @STYLE@ and @SCRIPT@ are what
all pages share (page.css, page.js), @DATA@ is the JSON. Names in the data are untrusted: a template has a content
security policy that lets no other script run, and its script puts text into the page as text only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHARED = {"@STYLE@": "page.css", "@SCRIPT@": "page.js"}


def fill(template: Path, data: dict[str, Any]) -> str:
    """A template with its data. The JSON has no ``<``, so nothing in it can end the element that holds it."""
    page = template.read_text(encoding="utf-8")
    for mark, name in _SHARED.items():
        page = _replace(page, mark, Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip())
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return _replace(page, "@DATA@", text)  # last, because it may hold the other marks


def _replace(page: str, mark: str, text: str) -> str:
    assert page.count(mark) == 1
    return page.replace(mark, text)
