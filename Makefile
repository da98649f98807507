# Every target makes .venv itself: `make quick_test` works in a fresh clone. `make help` lists the targets.
PYTHON ?= python3
EXTRAS ?= mlx,torch,dev
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: two threads under load were 10 to 100 times slower.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: help setup quick_test test check bench proof records clean

help:  ## list the targets
	@grep -E '^[a-z_]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

setup: $(STAMP)  ## both backends and the command, in .venv (EXTRAS=torch,dev for one backend)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mlx-training needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

quick_test: $(STAMP)  ## train and evaluate the small time-series model, a few minutes
	OMP_WAIT_POLICY=PASSIVE exec $(BIN)/mlx-training train quick_test --resume auto

test: $(STAMP)  ## the fast suite
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(STAMP)  ## linter, formatter, type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## ours beside its peers and hand-written loops, many minutes (docs/benchmarks.md)
	$(BIN)/python tools/bench.py

proof: $(STAMP)  ## slow evidence, in fresh installations with one backend and in the tests marked proof
	$(BIN)/python tools/fresh_environments.py
	$(ONE_THREAD) $(BIN)/python -m pytest -m proof

records: $(STAMP)  ## the runs of record of the language models, some hours; MLX_TRAINING_DATA names the data
	$(BIN)/python tools/record.py

clean:  ## the environment and every cache; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
