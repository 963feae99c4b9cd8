# Everything that is run from a checkout. `make help` lists it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet --quiet
STAMP := $(VENV)/.installed
TRANSFORMERS4 := $(VENV)/transformers4

.PHONY: help setup quickstart test test-gpu check bench-train bench-data bench-checkpoint bench-convert bench-plan bench-gpu faults fuzz clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## create .venv and install the project with its development extras

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch -c constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	rm -rf $(TRANSFORMERS4)
	$(PIP) install --no-deps --target $(TRANSFORMERS4) transformers==4.57.1 huggingface-hub==0.36.0 tokenizers==0.22.1
	touch $@

quickstart: setup  ## raw text to a trained model on this machine, each stage proven
	$(BIN)/megalemur quickstart

test: setup  ## the test suite
	$(BIN)/python -m pytest tests --ignore=tests/gpu -n 2 --dist loadfile

test-gpu: setup  ## the checks that need a GPU; they say why they skip without one
	$(BIN)/python -m pytest tests/gpu

check: setup  ## linters, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-train: setup  ## a training step beside a bare megatron-core loop and transformers
	$(BIN)/python -W ignore benchmarks/train_step.py

bench-data: setup  ## the preprocessor beside a pool, its engine and cp; its memory; opening its data
	$(BIN)/python -W ignore benchmarks/data_prep.py
	$(BIN)/python -W ignore benchmarks/data_prep.py memory --megabytes 2000
	$(BIN)/python -W ignore benchmarks/data_prep.py memory --documents 30000000
	$(BIN)/python -W ignore benchmarks/data_prep.py memory --megabytes 10000

bench-checkpoint: setup  ## saves with digests, in the background and beside cp, on 1, 2 and 4 ranks
	$(BIN)/python -W ignore benchmarks/checkpoint.py hashes
	$(BIN)/python -W ignore benchmarks/checkpoint.py

bench-convert: setup  ## conversions beside cp, and their memory, at the width of Llama-2-70B
	$(BIN)/python -W ignore benchmarks/convert.py

bench-plan: setup  ## planned memory beside megatron-core's modules on fake tensors, planned steps beside published ones, a search
	$(BIN)/python -W ignore benchmarks/plan_memory.py
	$(BIN)/python benchmarks/fit_plan.py
	$(BIN)/python -W ignore benchmarks/plan.py

bench-gpu: setup  ## the same on a GPU, at the width of Llama-2-70B
	$(BIN)/python -W ignore benchmarks/train_step.py --width 70b

faults: setup  ## kills, damage, faults: an hour of each campaign's tenth, or CAMPAIGN=name N=trials SEED=number
	$(BIN)/python -W ignore -m tests.faults.campaign $(CAMPAIGN) $(if $(N),--trials $(N)) $(if $(SEED),--seed $(SEED)) $(if $(CAMPAIGN)$(N),,--minutes 60)

fuzz: setup  ## a million mutated indexes, 50,000 strings through the fast engine, a merge beyond 2^32 tokens
	$(BIN)/python -m tests.faults.fuzz_index --mutations 1000000
	$(BIN)/python -m tests.faults.fuzz_tokens --strings 50000
	$(BIN)/python -m tests.faults.merge_large

clean:  ## remove what runs left behind, not the environment
	rm -rf out .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
