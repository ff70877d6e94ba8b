# All targets work in .venv of this checkout, which they create.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo
DEMO_COHORT := $(DEMO)/cohort
SEED ?= 0
export PYTHONNOUSERSITE := 1

.PHONY: help install demo demo-seeds trace test check format clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv and install sparsekit with its tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sparsekit needs Python >= 3.11; $(PYTHON) is older or missing. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## cohort of NIfTI files, dense FedAvg and FedSparsify at 95 %, one table, one report
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/sparsekit cohort make $(DEMO_COHORT) --subjects 960 --sites 8 --resolution 4 --environment uniform-iid --seed $(SEED)
	$(BIN)/sparsekit fed run --cohort $(DEMO_COHORT) --out $(DEMO)/fedavg --config examples/demo.toml --strategy fedavg --seed $(SEED)
	$(BIN)/sparsekit fed run --cohort $(DEMO_COHORT) --out $(DEMO)/fedsparsify --config examples/demo.toml --strategy fedsparsify-global --sparsity 0.95 --seed $(SEED)
	$(BIN)/sparsekit fed compare $(DEMO)/fedavg $(DEMO)/fedsparsify --out $(DEMO)/report.html

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest

check: $(STAMP) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright

format: $(STAMP) ## format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info
