"""JSON as RFC 8259 has it, which knows no number that is not finite: those are written as words."""

from __future__ import annotations

import json
import math
from typing import Any


def plain_json(data: Any) -> str:
    """The text of JSON types, dataclass-free; an infinite number or NaN is "Infinity", "-Infinity" or "NaN", a string.

    ``float`` of Python and ``Number`` of JavaScript read these words.
    """
    return json.dumps(finite_or_word(data), indent=1, allow_nan=False)


def finite_or_word(data: Any) -> Any:
    """The same data, every number in it that is not finite replaced by its word."""
    if isinstance(data, dict):
        return {key: finite_or_word(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite_or_word(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
