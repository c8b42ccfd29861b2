# Each target does all its set-up: Python 3.11 or newer and git are enough.
PYTHON ?= python3
# A CPU-only index for torch keeps a fresh Linux machine from pulling CUDA:
#   make reproduce TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: install reproduce verify bench test check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

reproduce: install
	$(BIN)/spectral-sinks reproduce --out results

bench: install
	OMP_NUM_THREADS=1 $(BIN)/python experiments/bench.py --out results

verify: install
	$(BIN)/spectral-sinks verify

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

clean:
	rm -rf .venv
