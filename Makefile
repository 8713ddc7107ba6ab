PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A module's tests run in one worker, as they share fixtures. In this order tests/distributed, which takes longest, is not
# left to the end.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench check lint types docs site dist format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## train a digits classifier without gradients
	$(BIN)/python examples/digits.py

test: $(STAMP) ## run the tests, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

test-slow: $(STAMP) ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

bench: $(STAMP) ## run the benchmarks against every peer; takes a quiet machine and a quarter of an hour
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

check: lint types site ## everything CI runs: lint, types, the site, tests
	@$(MAKE) --no-print-directory test

lint: $(STAMP) ## check style, formatting, and which station imports which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache

types: $(STAMP) ## check the types
	$(BIN)/mypy

docs: $(STAMP) ## serve the documentation, which follows your changes
	$(BIN)/python -m zensical serve

site: $(STAMP) ## build the documentation into build/site; a link that leads nowhere is an error
	$(BIN)/python -m zensical build --clean --strict
	$(BIN)/python docs/check_site.py build/site

dist: $(STAMP) ## build the wheel and the source distribution into dist
	$(BIN)/python -m build

format: $(STAMP) ## mend what can be mended of style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches and build products; .venv stays
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@
