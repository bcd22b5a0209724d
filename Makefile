# Every target sets up .venv by itself. Another interpreter: make PYTHON=python3.12
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Tests are shared out over the cores, one thread each; a worker takes about 2 GB.
SHARED := --numprocesses logical --maxprocesses 8 --dist worksteal
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types docs results bench report clean

help:  ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

setup: .venv/.done  ## Only .venv, with everything installed

demo: .venv/.done  ## Train the embedded default, draw samples, denoise, print where the report is
	$(BIN)/python train.py
	$(BIN)/python eval.py task=generate num_samples=64
	$(BIN)/python eval.py task=denoise sigma_t=0.5

test: .venv/.done  ## The tests, in minutes
	$(BIN)/python -m pytest -q -m 'not slow' $(SHARED)

test-slow: .venv/.done  ## The slow tests
	$(BIN)/python -m pytest -q -m slow

lint: .venv/.done  ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.done  ## Types, as far as pyproject.toml has them checked
	$(BIN)/mypy

docs: .venv/.done  ## The pages, into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

results: .venv/.done  ## The README's figures, from the newest run
	$(BIN)/python benchmarks/denoising.py

bench: .venv/.done  ## Speed against what people use today, in 25 minutes; also the README's table
	$(BIN)/python -m benchmarks.speed

report: .venv/.done  ## One page of a run, evaluation or sweep: make report RUN=<directory>
	@$(BIN)/python -m diffusion_lab.tracking $(RUN)

clean:  ## Remove .venv and caches; outputs stay
