# make demo    fine-tune a small T5, English to Romanian, under ZeRO-2 with optimizer offload (about five minutes)
# make test    the whole test suite, the quick tests first
#
# Each makes .venv and installs into it first, once. Options, taken when .venv is made (`make clean` to change them):
#
#   PYTHON=python3.12            the interpreter to build on, 3.10 or newer
#   TORCH="torch==2.12.1"        another torch than constraints.txt names
#   CONSTRAINTS=                 no tested versions: the newest that setup.cfg allows (or =FILE, your own list)
#   SYSTEM_SITE=1                use the packages that PYTHON already has, such as a torch built for your GPUs
#
# pip's own settings apply (pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...). Where the registry offers a CPU build of
# torch, it is preferred; for a GPU machine with such a registry, use SYSTEM_SITE=1 or TORCH="torch==2.13.0+cu130".
# Once .venv is there, nothing here needs the network.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?=
SYSTEM_SITE ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast test-slow lint format docs venv clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
	@echo "Others: test-fast, test-slow, lint, format, docs, venv, clean (removes .venv and caches, keeps out/)."

demo: $(VENV)/.installed
	$(BIN)/python examples/translation/demo.py

test: test-fast test-slow

# pytest fails (exit code 5) when no test was run; tests/conftest.py makes that include "all of them skipped".
test-fast: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow --durations=10 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m hf_zero_plugin.config.docs > docs/config.md.new
	mv docs/config.md.new docs/config.md

venv: $(VENV)/.installed-dev

$(VENV)/.installed: setup.cfg $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.10. Name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(if $(SYSTEM_SITE),--system-site-packages) $(VENV)
	@test -z "$(SYSTEM_SITE)" || $(BIN)/python -c 'import torch' || { \
	  echo "SYSTEM_SITE=1: an environment made by $(PYTHON) sees no torch. Name the interpreter whose own" >&2; \
	  echo "site-packages hold it (not one inside another virtual environment), or leave SYSTEM_SITE out." >&2; exit 2; }
	@$(if $(CONSTRAINTS),grep -v $(if $(TORCH)$(SYSTEM_SITE),'^torch==',-x '') $(CONSTRAINTS),true) > $(VENV)/constraints.txt
	@echo "Installing into $(VENV): some minutes the first time, torch is large."
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt $(if $(TORCH),'$(TORCH)') -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
