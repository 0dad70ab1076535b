# `make demo` and `make test` need Python 3.11 or 3.12, pip, g++ and a network once; see .ci/venv. The second call
# installs nothing.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Files of tests side by side, each in one process: compiling, which most of them do, keeps one core busy.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-long test-oldest coverage lint clean

demo: $(READY)
	$(BIN)/pifa demo

test: lint
	$(BIN)/pytest -m "not slow" $(PARALLEL)

test-long: lint
	$(BIN)/pytest

# The same tests with the oldest torch that is served, in an environment of its own.
test-oldest:
	$(MAKE) --no-print-directory VENV=.venv-oldest PINS=constraints-oldest.txt .venv-oldest/ready
	.venv-oldest/bin/pytest -m "not slow" $(PARALLEL)

# The lines and branches that the tests of `make test` do not reach, with their numbers.
coverage: $(READY)
	$(BIN)/pytest -m "not slow" --cov

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt $(PINS) .ci/venv
	@.ci/venv $(VENV) $(PINS)
	@touch $@

# Leaves $(VENV), which is expensive to make.
clean:
	rm -rf build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
