"""JSON that every reader takes: no number that is not finite is written as one."""

import json
import math

import pytest

from pifa_compile.evaluation import perplexity_of
from pifa_compile.plain_json import plain_json


def strict(text):
    """Read JSON as RFC 8259 has it: Python's reader alone takes NaN and Infinity."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_words_that_float_reads():
    data = {"a": [1.5, math.inf, (-math.inf, math.nan)], "b": {"c": math.inf, "d": None, "e": True, "f": 10**400}}
    found = strict(plain_json(data))
    assert found == {
        "a": [1.5, "Infinity", ["-Infinity", "NaN"]],
        "b": {"c": "Infinity", "d": None, "e": True, "f": 10**400},
    }
    assert float(found["a"][1]) == math.inf and math.isnan(float(found["a"][2][1]))


@pytest.mark.parametrize(("loss", "wanted"), [(0.0, 1.0), (1e4, math.inf), (math.inf, math.inf)])
def test_a_perplexity_that_is_too_large_for_a_float_is_infinite(loss, wanted):
    assert perplexity_of(loss) == wanted


def test_the_perplexity_of_a_loss_that_is_no_number_is_none():
    assert math.isnan(perplexity_of(math.nan))
