"""JSON on the disk: one text for every value, and no more from a text than that.

What is read may have been written by anybody. A text of a few bytes must not become gigabytes of objects, nest deeper
than Python can walk, or mean one thing to this reader and another to the next.
"""

from __future__ import annotations

import json
import math
from typing import Any

MOST_VALUES = 1 << 21  # in one text: a run of 64 MiB, the most that is read, has fewer; as objects some 300 MB
DEEPEST = 32  # levels of lists and objects
_LONGEST_INTEGER = 40  # characters


def canonical(value: Any) -> bytes:
    """The one JSON text of a value, for checksums. TypeError or ValueError if JSON cannot hold it exactly (NaN)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    ValueError for what is no JSON, and for what ``canonical`` never writes: a key that stands twice in one object,
    numbers that are not finite or absurdly long, more than MOST_VALUES values, more than DEEPEST levels.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values")
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except RecursionError as error:
        raise ValueError(f"it has more than {DEEPEST} levels") from error
    if not is_shallow(value):
        raise ValueError(f"it has more than {DEEPEST} levels")
    return value


def is_shallow(value: Any) -> bool:
    """Whether lists and dicts stand in each other no more than DEEPEST times."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return True
    return False


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_LONGEST_INTEGER]} is too large")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
