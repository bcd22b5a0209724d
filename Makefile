# Every target sets up .venv first. Another interpreter: make PYTHON=python3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Tests run in parallel on all cores, one thread each; a worker needs about 2 GB of memory.
SHARED := --numprocesses logical --maxprocesses 8 --dist worksteal
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow mutants lint types docs reference results bench report clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt -e

.venv/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[test]'
	touch $@

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[dev]'
	touch .venv/.test $@

setup: .venv/.done  ## Install everything into .venv

demo: .venv/.done  ## Train the default prior, draw samples, denoise test images
	$(BIN)/python train.py
	$(BIN)/python eval.py task=generate num_samples=64
	$(BIN)/python eval.py task=denoise sigma_t=0.5

test: .venv/.test  ## Run the tests (minutes)
	$(BIN)/python -m pytest -q -m 'not slow' $(SHARED)

test-slow: .venv/.done  ## Run the slow tests
	$(BIN)/python -m pytest -q -m slow

mutants: .venv/.done  ## Plant bugs in copies of the package; the quick tests must detect all of them (minutes)
	$(BIN)/python tests/mutants.py

PROSE := README.md CONTRIBUTING.md CHANGELOG.md benchmarks conf diffusion_lab tests $(wildcard docs/*.md)

lint: .venv/.done  ## Style, words, and the layers of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell --dictionary docs/words.txt $(PROSE)

types: .venv/.done  ## Check the types of the package with mypy --strict
	$(BIN)/mypy

docs: .venv/.done reference  ## Build the pages in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

reference: .venv/.done  ## Regenerate docs/configuration.md from conf/ and the constructors
	PYTHONPATH=docs $(BIN)/python -m reference

results: .venv/.done  ## Regenerate the README's denoising table and images from the newest run
	$(BIN)/python -m benchmarks.denoising

bench: .venv/.done  ## Compare the speed with diffusers and torchvision (25 minutes)
	$(BIN)/python -m benchmarks.speed

report: .venv/.done  ## Rebuild the report of a run, evaluation or sweep: make report RUN=<directory>
	@$(BIN)/python -m diffusion_lab.command.report $(RUN)

clean:  ## Remove .venv and caches, keep outputs
	rm -rf .venv .import_linter_cache .mypy_cache .pytest_cache .ruff_cache docs/_build
