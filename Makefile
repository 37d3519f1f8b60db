# Two commands do everything on a machine with Python 3.11+ and nothing installed:
#   make demo   train the full RIS model under the guard
#   make test   format check, lint, types, import contracts, tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Extra flags for pip, e.g. PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# for a small CPU-only torch on Linux.
PIP_FLAGS ?=
# Two torch threads are slower than one on small virtual machines; tests and benchmarks use one.
export OMP_NUM_THREADS ?= 1
# Processes that share the tests.
JOBS ?= 2

.PHONY: demo test check format lint types contracts tests bench clean

demo: $(VENV)/.installed
	env -u OMP_NUM_THREADS $(BIN)/python -m reference_trainer train --preset overfit

test: $(VENV)/.installed check tests

check: format lint types contracts

format: $(VENV)/.installed
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

contracts: $(VENV)/.installed
	$(BIN)/lint-imports

tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks.overhead
	$(BIN)/python -m tests.benchmarks.trainer
	$(BIN)/python -m tests.benchmarks.judging
	$(BIN)/python -m tests.benchmarks.music

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("gradguard needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.x") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
