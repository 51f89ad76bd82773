# make demo   a real language model quantized, measured before and after, saved
# make test   everything continuous integration runs
# make help   all targets
#
# Needs python3 (>= 3.11), make and a package index. Settings, as in
# `make demo PYTHON=python3.12`:
#   PYTHON     the interpreter the environment is made from
#   PIP_FLAGS  for pip install, for instance another index
#   WORKERS    processes that run the tests

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_FLAGS ?=
export WORKERS ?= 2
VENV ?= .venv
NEWEST_VENV ?= .venv-newest

DEMO ?= $(VENV)/bin/python -m experiments.calibrate \
  --flagfile=experiments/flags/smollm2_w4a16_gptq.flags
# The main job on the real model, short: all blocks, few samples.
SMOKE_OUTPUT ?= out/smoke
SMOKE ?= $(DEMO) --output=$(SMOKE_OUTPUT) --sequences=4 --eval_tokens=2048

# The environment holds the CPU build of JAX. Compiled programs are kept, so
# that the second run of anything starts at once.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/jaxq
export JAX_PLATFORMS ?= cpu
export JAX_COMPILATION_CACHE_DIR ?= $(CACHE)/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3
export TF_CPP_MIN_LOG_LEVEL ?= 2
# Compiling for a TPU that is not there takes none from another process.
export ALLOW_MULTIPLE_LIBTPU_LOAD ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTEST := $(VENV)/bin/python -m pytest
CODE := jaxq models pallas_kernels experiments launch tools tests benchmarks
CODE := $(wildcard $(CODE))

.PHONY: help demo test lint types unit smoke newest build-files format clean

help:  ## Lists the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/.demo  ## Quantizes SmolLM2-135M to 4 bits and prints before and after.
	$(DEMO)

test: lint types unit smoke newest  ## Everything continuous integration runs.

lint: $(VENV)/.test  ## Lint and format, changing nothing.
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(VENV)/.test  ## The type checker.
	$(VENV)/bin/mypy

# One thread per worker: the cores are shared out by process.
unit: $(VENV)/.test  ## All tests, in parallel.
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadscope

smoke: $(VENV)/.test  ## A short run of the main job on the real model.
	rm -rf $(SMOKE_OUTPUT) $(SMOKE_OUTPUT).run
	$(SMOKE)

newest:  ## The smoke subset on the newest JAX, where Python >= 3.12 is found.
	@tools/newest_jax.sh $(NEWEST_VENV) $(PIP_FLAGS)

build-files: $(VENV)/.test  ## Writes the BUILD files from the imports.
	$(VENV)/bin/python -m tools.build_files --write

format: $(VENV)/.test  ## Formats, and mends what lint can mend.
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:  ## Removes environments and caches, not results or downloads.
	rm -rf .venv .venv-newest build dist *.egg-info \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@found=$$($(PYTHON) -V 2>/dev/null || echo 'not found'); \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  2>/dev/null || { \
	  echo "error: $(PYTHON) is $$found; jaxq needs Python >= 3.11." \
	    "Give one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing jaxq into $(VENV), this once.'
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing jaxq and its test tools into $(VENV), this once.'
	$(VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) \
	  -e '.[test,tpu-aot,demo]'
	@touch $@ $(VENV)/.demo
