# Everything a developer or CI runs. Each target does its own set-up; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python >= 3.11 that really starts (a pyenv shim may exist without its version).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt
# One thread a worker: two workers on two cores, and the same sums on every machine.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: help setup demo test test-slow mutants kernels ascend lint format example bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## make .venv with everything in it (repeated only when pyproject.toml or constraints.txt change)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Helios HAL needs Python 3.11 or newer, and none was found. Install one, or: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "Setting up .venv with $$($(PYTHON) --version): once, one to several minutes, mostly for torch"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@# The build backend comes under the same pins, hence no build isolation: an isolated build would ignore them.
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: ## make a small checkpoint and generate video from it on this machine
	@test -e $(READY) || echo "make demo: first the set-up, a few minutes depending on your network; then the demo itself"
	@$(MAKE) --no-print-directory setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/demo.sh

test: lint ## set up, lint, and run the tests (slow ones excepted)
	$(PYTEST) -n $(WORKERS) -m "not slow" --durations=10

test-slow: setup ## the tests that take minutes each
	$(PYTEST) -m slow --durations=0

mutants: setup ## the conformance suite against wrong backends: each must be caught
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tools/mutants.py --out docs/mutants.md

kernels: setup ## compile the CUDA kernels for every architecture, without a GPU, and write docs/kernels.md
	$(BIN)/python tools/kernel_report.py --write

ascend: setup ## the Ascend backend on torch_npu's schemas, against wrong uses of it, and the suite over its emulation
	bash tools/ascend/setup.sh
	OMP_NUM_THREADS=1 PYTHONPATH=tools/ascend $(BIN)/python tools/ascend/trace_kernels.py
	OMP_NUM_THREADS=1 PYTHONPATH=tools/ascend $(BIN)/python tools/ascend/wrong_uses.py
	$(PYTEST) -n $(WORKERS) tests/backends/ascend
	for precision in bf16 fp32; do OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
		$(BIN)/helios certify --backend ascend:emulated --precision $$precision --out out/ascend-$$precision; done

lint: setup ## ruff, mypy --strict, the floors, the sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict helios helios_hal backends conformance tools
	$(BIN)/lint-imports
	$(BIN)/python tools/lines.py --check

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

example: setup ## make docs/examples/cpu anew: a bundle belongs to the suite that made it
	@# Made elsewhere and moved: tracked files that are gone meanwhile would be noted as changes of the source.
	rm -rf out/example
	$(BIN)/helios certify --backend cpu --out out/example
	rm -rf docs/examples/cpu
	mkdir -p docs/examples
	mv out/example docs/examples/cpu
	$(BIN)/helios verify docs/examples/cpu

bench: setup ## speed on this CPU, side by side with diffusers
	$(BIN)/python tools/bench.py --compiled --out out/bench.json

clean: ## remove .venv and everything that was built or cached
	rm -rf .venv .ascend build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
