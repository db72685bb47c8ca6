# `make help` lists what there is to do. Everything that a target needs, `make` sets up itself, in .venv and
# build/; a second call does nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SECONDEXPANSION:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# What you may set:  make book PROFILE=gpu JOBS=1  ·  make test ARGS="-k barrier" WORKERS=0  ·  make PYTHON=python3.12
PROFILE ?= quick
# Chapters that run at once. Each trains on every core, but starts, draws and thinks on one; a GPU has one owner.
JOBS ?= $(if $(filter quick,$(PROFILE)),2,1)
MAKEFLAGS += -j$(JOBS)
ARGS ?=
PORT ?= 8000
KILLS ?= 1000
# Processes that share the tests, a file each; 0: none, for a debugger. One that dies ends all of it: xdist
# starts another, and may then wait for ever.
WORKERS ?= auto
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
VENV ?= .venv
# Any Python from 3.11 to 3.13; the first that is found.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys; print("yes" * ((3, 11) <= sys.version_info < (3, 14)))' 2>/dev/null),$(p))))

BIN := $(VENV)/bin
BOOK := $(BIN)/python -m companion.book
OUT := build/$(PROFILE)
SITE := $(OUT)/book/_build/html/index.html
# Touched at the end of a step that writes many files.
READY := $(VENV)/.ready
BUILT := $(OUT)/.built

CHAPTERS := $(patsubst chapters/%.md,%,$(wildcard chapters/*.md))
NOTEBOOKS := $(CHAPTERS:%=build/notebooks/%.ipynb)
# The longest first: of two that run at once, neither ends long after the other.
LONGEST := 01_instability 04_layerwise 05_gpt
EXECUTED := $(patsubst %,$(OUT)/executed/%.ipynb,$(filter $(LONGEST),$(CHAPTERS)) $(filter-out $(LONGEST),$(CHAPTERS)))
# What a chapter's numbers can depend on: all of the package but the book's own steps and the command line.
PACKAGE := $(shell find src/companion -name '*.py' -not -path '*/book/*' -not -path '*/cli/*' -not -name 'cli.py') \
	$(shell find data/recorded -name '*.json' -o -type d 2>/dev/null) $(wildcard data/claims.yaml)
PAGES := $(wildcard *.md) _config.yml _toc.yml references.bib $(wildcard book/*) $(wildcard src/companion/book/*.py)

.PHONY: book notebooks test test-quick soak lint lint-style lint-types lint-types-of-tests format readme serve gpu-pack clean distclean help

book: $(BUILT) ## the site: PROFILE=quick (default: minutes on a CPU), gpu or paper
	@printf 'The book is ready:\n  %s\n  file://%s\n' '$(SITE)' '$(abspath $(SITE))'

notebooks: $(NOTEBOOKS) ## build/notebooks/*.ipynb, for papermill or Jupyter

test: $(READY) ## all tests
	$(BIN)/python -m pytest $(SHARED) $(ARGS)

test-quick: $(READY) ## the tests that take no more than a few seconds each: for daily work
	$(BIN)/python -m pytest $(SHARED) -m 'not slow' $(ARGS)

soak: $(READY) ## 1,000 kills of commands on one store (KILLS=...): nothing wrong, lost or left behind; hours
	$(BIN)/python tests/soak.py $(KILLS) build/soak-$$$$

lint: lint-style lint-types lint-types-of-tests ## ruff, formatting, types and the direction of imports, of the package and the chapters' cells

lint-style: $(READY) $(NOTEBOOKS)
	$(BIN)/ruff check . $(NOTEBOOKS)
	$(BIN)/ruff format --check . $(NOTEBOOKS)
	$(BIN)/lint-imports

lint-types: $(READY)
	$(BIN)/mypy

lint-types-of-tests: $(READY)
	$(BIN)/mypy --config-file tests/mypy.ini

format: $(READY) ## format the package and the chapters' cells, and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BOOK) format

readme: $(BUILT) ## README.md's table of what held, and its picture, from the built run
	@$(BOOK) readme --profile $(PROFILE)

serve: $(BUILT) ## the site at http://localhost:8000 (PORT=...); it also opens from the disk
	$(BIN)/python -m http.server --bind localhost --directory '$(dir $(SITE))' $(PORT)

gpu-pack: ## gpu-pack/: the data and the commit for benchmarks/on_gpu.py; CARRY=DIR: and what a first call left
	@$(PYTHON) benchmarks/gpu_pack.py $(if $(CARRY),--carry '$(CARRY)')

clean: ## remove what was built; training runs (runs/) and .venv stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean ## remove .venv too; training runs (runs/) stay
	rm -rf $(VENV)

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The environment. One resolution for the lock and the package, so that torch and torchvision fit each other.
$(READY): requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'error: no Python from 3.11 to 3.13 on the path; set PYTHON=...' >&2; exit 1; }
	@test -x $(BIN)/python || { echo 'Setting up $(VENV) with $(PYTHON) (once; torch is large)'; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo 'error: $(PYTHON) cannot make a virtual environment (Debian: install python3-venv)' >&2; exit 1; }; }
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -r requirements.lock -e '.[book,dev]'
	@touch $@

# Chapter -> notebook -> executed notebook -> site. Each step writes under another name and moves it.
build/notebooks/%.ipynb: chapters/%.md src/companion/book/notebooks.py src/companion/book/parameters.py | $(READY)
	@$(BOOK) notebooks $*

# The profile's folder is listed for the sake of a file that appears or goes.
$(OUT)/executed/%.ipynb: build/notebooks/%.ipynb $(PACKAGE) $$(wildcard chapters/profiles/$(PROFILE) chapters/profiles/$(PROFILE)/$$*.yaml) | $(READY)
	@JOBS=$(JOBS) $(BOOK) execute --profile $(PROFILE) $*

$(BUILT): $(EXECUTED) $(PAGES) data/claims.yaml | $(READY)
	@$(BOOK) stage --profile $(PROFILE)
	@$(BOOK) html --profile $(PROFILE)
	@touch $@

# Keep them: they are dear.
.SECONDARY: $(NOTEBOOKS) $(EXECUTED)
