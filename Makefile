# Each target sets up what it needs; nothing has to be installed first but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: help dev demo test lint check fix clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,zoo]'
	@touch $@

dev: $(VENV)/.installed  ## virtual environment with everything

demo: dev  ## the whole job on handwritten digits, offline
	$(BIN)/secure-export demo --out build/demo

test: dev  ## the tests
	$(BIN)/python -m pytest

lint: dev  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check secure_export tests benchmarks
	$(BIN)/ruff format --check secure_export tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## what CI runs

fix: dev  ## format and mend what can be mended
	$(BIN)/ruff check --fix secure_export tests benchmarks
	$(BIN)/ruff format secure_export tests benchmarks

clean:  ## remove what the targets made
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache
