# Two commands matter: `make quickstart` and `make test`. Both need only Python 3.11 or newer and make.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_DIR ?= runs/quickstart
TORCH := $(shell grep -m1 '^torch==' constraints.txt)
COVERAGE_FLOOR := 85
TORCHVISION := .torchvision

# Ranks of a test share the processors; one thread each is faster than all of them contending.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Packages are compiled as they are imported: a tenth of them, where pip would compile all for a minute and a half.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup quickstart test test-all test-torchvision check corpus clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with the pinned packages (only when pyproject.toml or constraints.txt changed)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or pass PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); omni-train needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that the resolve of everything else finds it in place and keeps the build that was chosen.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[corpus,dev]'
	@touch $@

quickstart: setup  ## train the tiny model through every stage on two CPU ranks, print the results, write the report
	$(BIN)/omni-train data prepare tiny
	$(BIN)/omni-train run recipes/tiny.yaml run_dir=$(RUN_DIR)

test: setup  ## the fast tests, with a floor of 85 % line coverage
	$(call pytest,-m 'not slow')

test-all: setup  ## every test, the slow ones too, with the same floor
	$(call pytest)

# Tests of single processes side by side, then one by one those that start ranks, which want the processors for themselves.
pytest = failed=0; \
	$(BIN)/python -m pytest $(1) -n auto --dist loadfile tests/unit tests/parity --cov=omni_train --cov-report= || failed=1; \
	$(BIN)/python -m pytest $(1) tests/invariant tests/e2e --cov=omni_train --cov-append --cov-report=term \
	  --cov-fail-under=$(COVERAGE_FLOOR) || failed=1; \
	exit $$failed

# In a folder of its own: only these tests may see it, and its wheels are for CUDA (tests/parity/torchvision_for_tests.py).
$(TORCHVISION)/torchvision: | setup
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --no-deps --target $(TORCHVISION) 'torchvision==0.28.*'

test-torchvision: setup $(TORCHVISION)/torchvision  ## videos against stock's whole processor, which needs torchvision
	OMNI_TRAIN_TORCHVISION=$(TORCHVISION) $(BIN)/python -m pytest tests/parity/test_video_processor.py tests/parity/test_export.py

check: setup  ## lint, format, types and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy omni_train
	$(BIN)/python -m pytest -m 'not slow'

corpus: setup  ## prepare the small corpus only
	$(BIN)/omni-train data prepare tiny

clean:  ## remove caches and coverage files; .venv, data and runs stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache build htmlcov *.egg-info
	find . -maxdepth 1 -name '.coverage*' ! -name .coveragerc -delete
	find omni_train tests -name __pycache__ -type d -prune -exec rm -rf {} +
