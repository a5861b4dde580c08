# The few verbs of this project; `make` alone lists them.

# The first Python on the path that is new enough; `make PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
READY := .venv/.ready
# Read by the demo, and by the tests of other releases; given on make's command line.
export TOKENS JSON RELEASES CSV

.PHONY: help setup demo test test-fast architectures features versions contract lint format kernels gpu-check clean soak
.DEFAULT_GOAL := help

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## .venv with the vLLM that fits this machine, and the project in it (PYTHON= names the interpreter)

# Again when what is installed, or how, has changed.
$(READY): pyproject.toml setup.py tools/install_engine.py $(wildcard csrc/*/*)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "[1/3] virtual environment .venv from $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "[2/3] vLLM and torch for this machine (several minutes the first time)"
	@$(BIN)/python tools/install_engine.py
	@echo "[3/3] minference-vllm, with its native kernels where a compiler is there"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dev]"
	@touch $@

demo: setup ## a needle in a long prompt, dense and sparse, through vllm serve (TOKENS=32768, JSON=1)
	@$(BIN)/python examples/demo/run.py $(ARGS)

# Two processes; the tests of a file stay together, since they share what they start.
TWO := -n 2 --dist loadfile
FAST := -m "not engine and not older_vllm" $(TWO)
# Of the releases of vLLM the oldest on this torch, and the installed one, by one of our engines. An engine takes most of a
# GPU's memory: there one process.
ENGINES = -m "engine and not architectures and not features" -k "not versions or own_backend_answers or native" \
	$(if $(shell nvidia-smi -L 2>/dev/null),,$(TWO))

test: setup lint ## lint, types, and all tests (fifteen to twenty-five minutes)
	@$(BIN)/pytest $(FAST) $(ARGS)
	@RELEASES="0.27.1 0.32.0" CSV= $(BIN)/pytest $(ENGINES) $(ARGS)

test-fast: setup ## the tests that start no engine (four to seven minutes)
	@$(BIN)/pytest $(FAST) $(ARGS)

architectures: setup ## the architectures of docs/models.md in vLLM's CPU engine, tiny (ten to twenty minutes)
	@$(BIN)/pytest tests/engine/test_engine_architectures.py $(ARGS)

features: setup ## the options of vLLM in docs/features.md that `make test` leaves out (five to ten minutes)
	@$(BIN)/pytest -m features $(ARGS)

versions: setup ## vLLM's CPU engine in every release that we support (a minute or two each; RELEASES="0.27.1 0.31.0" chooses, CSV= appends rows)
	@$(BIN)/pytest -m versions $(ARGS)

contract: setup ## our GPU classes in CUDA releases of vLLM, old and new, without a GPU (downloads 3 GB the first time)
	@$(BIN)/pytest -m contract $(ARGS)

MINUTES ?= 30

soak: setup ## one server under mixed load for MINUTES=30, killed and started again in between; answers, memory, counters
	@$(BIN)/python benchmarks/soak.py --minutes $(MINUTES) $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

kernels: setup ## what the Triton kernels cost on NVIDIA GPUs, compiled ahead of time (no GPU needed)
	@$(BIN)/python tools/kernel_account.py $(ARGS)

gpu-check: setup ## on a machine with an NVIDIA GPU: all its tests and benchmarks (hours; ARGS=--quick: 10 minutes; ARGS=--rehearse: without a GPU)
	@$(BIN)/python tools/gpu_check.py $(ARGS)

clean: ## remove everything that make has made, the environment included
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_output soak_output minference_vllm/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
