# `make demo` and `make test` work on a fresh machine: they set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
# On a machine with few cores, two one-thread processes beat one of two threads.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format bench clean

$(VENV)/.runs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[sds,diffusers,report]'
	touch $@

$(VENV)/.develops: $(VENV)/.runs
	$(INSTALL) -e '.[dev]'
	touch $@

# Two prompts by two methods, standard SDS and carv, at the same wall-clock time. About 6 minutes after the set-up.
demo: $(VENV)/.runs
	$(BIN)/carv compare --out demo

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.develops
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.develops
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.develops
	$(BIN)/python benchmarks/sampler_overhead.py
	$(BIN)/python benchmarks/per_draw_gradients.py
	$(BIN)/python benchmarks/coverage.py

clean:
	rm -rf $(VENV) demo build dist
