# What a developer types. `make` alone lists the targets. All it needs is python3.11 or newer with venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.labextension-built
BENCH := $(VENV)/.bench-installed
LIBRARIES := $(VENV)/.libraries-installed
# The build of torch depends on the machine: make setup TORCH="torch==2.11.0 --index-url ..." takes another one.
TORCH ?= torch==2.13.0
CONSTRAINTS := .ci/constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/torch.txt -c $(CONSTRAINTS)
FRONT_END := $(shell find labextension/src labextension/style -type f ! -name schema.d.ts) $(filter-out %/openapi.json, $(wildcard labextension/*.json labextension/*.mjs)) labextension/yarn.lock
ARGS ?=
# Tests run in so many processes beside each other; auto chooses by cores and memory, 0 is this one process (for --pdb).
WORKERS ?= auto
# Tests that start no process, or only short ones: rules decided by values, and the order of the house.
QUICK := tests/core tests/protocol tests/system tests/storage tests/widgets tests/magics tests/house

.PHONY: help setup demo lab test stories quick quick-tests quick-lint bench lint chaos compat

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(BUILT)  ## make .venv with everything for working on the project, and Chromium where it can be installed
	@.ci/browser

demo: $(BUILT)  ## run the quickstart notebook inside a real Jupyter server and print what came of it
	$(BIN)/python notebooks/run_quickstart.py $(ARGS)

lab: $(BUILT)  ## open JupyterLab on notebooks/
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

test: setup  ## run the tests; ARGS="-k name" for some of them, WORKERS=0 for one process
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

stories: setup  ## run what a user sees: JupyterLab in a browser, whole notebooks, and what else takes as long
	$(BIN)/python -m pytest -n $(WORKERS) -m "(story or browser) and not soak" $(ARGS)

quick: $(BUILT)  ## the tests of rules and values, and lint, in less than a minute
	@$(MAKE) --no-print-directory --jobs=2 --output-sync quick-lint quick-tests

quick-tests:
	$(BIN)/python -m pytest -q -m "not alone and not slow and not soak and not story and not browser" $(QUICK) $(ARGS)

quick-lint: lint

bench: $(BENCH)  ## measure against the peers, side by side
	$(BIN)/python -m tests.bench $(ARGS)

lint: $(BUILT)  ## ruff, mypy, the import rules; types, eslint and unit tests of the front end
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd labextension && export PATH="$(CURDIR)/$(BIN):$$PATH" && jlpm run check && jlpm run lint && jlpm run test

chaos: $(BUILT)  ## inject the faults that the promises are about
	$(BIN)/python -m tests.chaos $(ARGS)

compat: $(LIBRARIES) $(BUILT)  ## libraries that notebooks use; the core with the oldest and the newest that are allowed
	$(BIN)/python -m pytest -n $(WORKERS) tests/compat $(ARGS)
	.ci/compat oldest $(ARGS)
	.ci/compat newest $(ARGS)

# torch first and then held: a resolver that backtracks would otherwise try every build of it.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@[ -x $(BIN)/python ] || .ci/make-venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip freeze | grep '^torch==' > $(VENV)/torch.txt
	$(INSTALL) --editable ".[test,dev]"
	@touch $@

# Installing again builds the front end where its sources are newer, and puts it where JupyterLab looks.
$(BUILT): $(FRONT_END) | $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(LIBRARIES): $(INSTALLED)
	$(INSTALL) --editable ".[test,dev,compat]"
	@touch $@

$(BENCH): $(INSTALLED)
	$(INSTALL) --editable ".[test,dev,bench]"
	@touch $@
