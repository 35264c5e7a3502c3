# One command per job; a bare `make` lists them. Everything is installed into .venv, nothing outside the checkout.
#
#   PYTHON=python3.12 make test      another interpreter
#   make demo WORDS="charming vile"   words to predict
#   make demo PROCESSES=2             in several processes
#   make test TESTS=tests/loops      some tests only
#   make test WORKERS=1              one process
#   make fuzz KILLS=1000             more kills

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
WORDS ?=
PROCESSES ?= 1
TESTS ?=
KILLS ?= 200
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

VENV := .venv
PY := $(VENV)/bin/python
REQUIREMENTS := pyproject.toml constraints.txt
LAUNCH := $(if $(filter-out 1,$(PROCESSES)),-m torch.distributed.run --nproc-per-node $(PROCESSES))
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Models and data come with packages; nothing is looked up on a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test format lint types tests docs bench fuzz clean env

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## Fine-tune a pretrained MiniLM on word sentiment, then predict WORDS="..."
	$(PY) $(LAUNCH) examples/sentiment.py $(WORDS)

test: lint types tests ## Run every check: lint, types, import contracts, doctests, tests

format: $(VENV)/.dev ## Format the code and apply safe lint fixes
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

lint: $(VENV)/.dev ## Check lint, format and the import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) $(VENV)/bin/lint-imports --no-cache

types: $(VENV)/.dev ## Check the types of fts/ in strict mode
	$(PY) -m mypy

# One thread per worker: tests are small, and threads of several workers would fight for the cores.
tests: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile $(TESTS)

docs: $(VENV)/.docs ## Build the documentation into site/
	$(PY) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: $(VENV)/.dev ## Measure steps, prediction, checkpoints, two processes and the import against peers
	$(PY) benchmarks/import_time.py
	$(PY) benchmarks/step.py
	$(PY) benchmarks/predict.py
	$(PY) benchmarks/checkpoint.py
	$(PY) benchmarks/distributed.py

fuzz: $(VENV)/.dev ## Kill training processes 200 times, run the laws with many more generated examples, and the long tests
	$(PY) -m tests.reliability.kills --kills $(KILLS)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --hypothesis-profile=fuzz $(or $(TESTS),tests/laws tests/reliability tests/distributed \
	  tests/transforms/test_sharded.py tests/testing/test_process_pool.py)

clean: ## Remove .venv, caches and built pages (runs/, with trained models, stays)
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find fts tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

env: $(VENV)/.dev

# The environment. Each stamp stands for a set of extras and is renewed when a requirement changes.

$(VENV)/pyvenv.cfg:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "make: '$(PYTHON)' is not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: fts needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)

$(VENV)/.demo: $(REQUIREMENTS) $(VENV)/pyvenv.cfg
	@echo "Installing fts and what the examples need into $(VENV); this takes a minute or two the first time."
	$(INSTALL) -e '.[trainer,examples]'
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS) $(VENV)/pyvenv.cfg
	@echo "Installing fts and the tools into $(VENV); this takes a minute or two the first time."
	$(INSTALL) -e '.[trainer,examples,dev]'
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(REQUIREMENTS) $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[docs]'
	@touch $@
