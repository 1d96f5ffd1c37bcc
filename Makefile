# `make help` lists the targets. PYTHON chooses the interpreter for .venv: make test PYTHON=python3.11
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs site pictures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## train a small policy and compare it with other schedules
	$(BIN)/rlsched train --preset demo --run-dir runs/demo
	$(BIN)/rlsched compare --policy runs/demo/policy.safetensors --tasks digits --out runs/demo-compare

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## write the pages that are generated from the code, and build the site in docs/_build/html
	$(BIN)/python docs/generate.py
	$(MAKE) site

site: $(STAMP) ## build the site alone, from the pages as they are
	$(BIN)/python -m sphinx -q -W --keep-going -d docs/_build/doctrees docs docs/_build/html

pictures: $(STAMP) ## take the site's pictures of TensorBoard; needs Chromium, and some minutes
	$(BIN)/python docs/pictures.py

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, and the constraint then holds it: nothing that depends on torch may replace it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	printf '%s\n' '$(TORCH)' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@
