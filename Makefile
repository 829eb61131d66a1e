# The few commands of the project; CI calls only these. `make help` lists them.
PYTHON ?= python3
MODEL ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_VERSION := 2.13.0
TRITON_VERSION := 3.7.1
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup serve test check bench size clean

help: ## list these commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(STAMP) ## make .venv with pinned versions (no CUDA packages without an NVIDIA GPU)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quire needs Python 3.11 or newer; set PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	@if [ "$$(uname -s)" != Linux ]; then \
	  echo "Installing torch $(TORCH_VERSION)"; $(BIN)/pip install --quiet torch==$(TORCH_VERSION); \
	elif command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "Installing torch $(TORCH_VERSION) for NVIDIA GPUs"; $(BIN)/pip install --quiet torch==$(TORCH_VERSION) triton==$(TRITON_VERSION); \
	else \
	  echo "Installing torch $(TORCH_VERSION) for the CPU"; \
	  { $(BIN)/pip install --quiet --no-deps "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	    || $(BIN)/pip install --quiet --no-deps "torch==$(TORCH_VERSION)+cpu" --index-url $(TORCH_CPU_INDEX); } \
	  && $(BIN)/pip install --quiet --no-deps triton==$(TRITON_VERSION); \
	fi
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

serve: $(STAMP) ## serve the bundled model on 127.0.0.1:8000 (MODEL=dir-or-name, ARGS="--port 9000")
	$(BIN)/quire serve $(MODEL) $(ARGS)

test: $(STAMP) ## run all tests
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) ## lint, format, strict types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p quire
	$(BIN)/python -m pytest -q tests/test_layering.py

bench: $(STAMP) ## measure the scheduler and the kernels on this machine
	$(BIN)/python benchmarks/paging.py
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/speculation.py
	$(BIN)/python benchmarks/kernels.py

size: ## lines per file, longest first; functions over 60 lines
	@$(PYTHON) docs/size.py

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
