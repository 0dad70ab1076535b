"""Loggers are quiet inside, and as they were after it, also after an error."""

import logging

import pytest

from pifa_compile.quiet import errors_only


def test_only_errors_are_logged_inside_and_the_level_comes_back(caplog):
    logger = logging.getLogger("loud")
    logger.setLevel(logging.INFO)
    with errors_only("loud"):
        logging.getLogger("loud.part").warning("not this")
        logger.error("this")
    logger.info("and this")
    assert caplog.messages == ["this", "and this"]


def test_the_level_comes_back_after_an_error_too():
    logger = logging.getLogger("loud")
    logger.setLevel(logging.DEBUG)
    with pytest.raises(KeyError), errors_only("loud"):
        raise KeyError("x")
    assert logger.level == logging.DEBUG


def test_as_a_decorator_it_serves_every_call(caplog):
    @errors_only("loud")
    def call():
        logging.getLogger("loud").warning("not this")
        logging.getLogger("loud").error("this")

    call()
    call()
    assert caplog.messages == ["this", "this"]
