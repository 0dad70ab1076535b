"""JSON that means one thing, and takes no more memory than it should."""

import json
import random

import pytest

from pifa_compile.store.json_text import DEEPEST, MOST_VALUES, canonical, is_shallow, parse


def nested(levels):
    value = 1
    for level in range(levels):
        value = [value] if level % 2 else {"x": value}
    return value


def test_what_is_written_comes_back():
    chance = random.Random(0)

    def tree(levels):
        leaf = [None, True, -3, 2**63, 0.1, 1e-300, "", "Grüße\n\0", chance.random(), chance.getrandbits(70)]
        if levels == 0 or chance.random() < 0.2:
            return chance.choice(leaf)
        if chance.random() < 0.5:
            return [tree(levels - 1) for _ in range(chance.randrange(4))]
        return {str(chance.random()): tree(levels - 1) for _ in range(chance.randrange(4))}

    for _ in range(200):
        value = tree(6)
        assert parse(canonical(value)) == value
        assert parse(json.dumps(value, ensure_ascii=False, indent=1).encode()) == value
    assert parse(canonical("\ud800")) == "\ud800"


def test_one_value_has_one_text():
    assert canonical({"b": 1, "a": [1.0, "ä"]}) == b'{"a":[1.0,"\\u00e4"],"b":1}'
    for value in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            canonical(value)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[1,]", b"nul", b"\xff\xfe", b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"[1, -1e400]", b"1 2",
        b'{"a": 1, "a": 1}', b'[{"x": {"b": 1, "c": 2, "b": 3}}]', b"9" * 41, b"-" + b"9" * 5000,
        '{"a": 1}'.encode("utf-16"), b'\xef\xbb\xbf{"a": 1}', b"[" * 200_000, b'{"a":' * 200_000,
    ],
    ids=lambda text: repr(text[:16]),
)  # fmt: skip
def test_what_is_not_written_so_is_no_json(text):
    with pytest.raises(ValueError):
        parse(text)


def test_depth_has_an_end():
    assert parse(canonical(nested(DEEPEST))) == nested(DEEPEST)
    assert is_shallow(nested(DEEPEST)) and not is_shallow(nested(DEEPEST + 1))
    for levels in (DEEPEST + 1, 300, 900):
        with pytest.raises(ValueError, match=f"more than {DEEPEST} levels"):
            parse(b"[" * levels + b"1" + b"]" * levels)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"1,"])
def test_a_text_of_many_values_is_refused_before_they_are_made(piece):
    with pytest.raises(ValueError, match=f"more than {MOST_VALUES} values"):
        parse(b"[" + piece * MOST_VALUES + b"1]")
    assert len(parse(b"[" + piece * 1000 + b"1]")) == 1001
