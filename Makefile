# Every target builds .venv when it is missing. Needs Python 3.10 or newer and make.
PYTHON ?= python3
VENV ?= .venv
FLOORS := $(VENV)-floors
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help venv fit test test-slow test-matrix test-floors check format docs release bench compare
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(INSTALLED) ## the project, editable, with its dev extra, in .venv

$(INSTALLED): pyproject.toml constraints.txt tools/mend_torchvision.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python tools/mend_torchvision.py
	touch $@

fit: venv ## adapt a pretrained ViT to handwritten digits: a minute or two on two cores
	$(BIN)/python -m geolora_pl fit --config configs/quickstart.yaml

test: venv ## the tests, without the slow ones
	$(BIN)/python -m pytest

test-slow: venv ## the slow tests alone
	$(BIN)/python -m pytest -m slow

test-matrix: venv ## the tests with other kernels, threads, seeds and orders, and beside busy processes: hours
	$(BIN)/python tools/test_matrix.py

test-floors: $(FLOORS)/installed ## the tests, at the lowest version allowed of every dependency but torch
	$(FLOORS)/bin/python -m pytest -W default # no errors: old libraries warn of what newer ones deprecate

$(FLOORS)/installed: $(INSTALLED) tools/floors.py
	$(PYTHON) -m venv $(FLOORS)
	$(BIN)/python tools/floors.py > $(FLOORS)/constraints.txt
	$(FLOORS)/bin/python -m pip install --quiet --constraint $(FLOORS)/constraints.txt --editable '.[dev]'
	$(FLOORS)/bin/python tools/mend_torchvision.py
	touch $@

check: venv ## format, lint, types, tests and what they leave out
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

format: venv ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: venv ## the documentation as a site, in build/docs; a reference that leads nowhere is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -c docs/site . build/docs

release: venv ## the archives of this version, in dist, checked as the index checks them
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

bench: venv ## what a step costs, beside LoRA, AdaLoRA, full fine-tuning and frozen layers (a quarter of an hour on two cores)
	$(BIN)/python benchmarks/speed/throughput.py step memory event growth
	$(BIN)/python benchmarks/speed/throughput.py loss --model bert_tiny --batch_size 16 --length 32

compare: venv ## this package beside its peers on two shifts of images (about half an hour on two cores)
	$(BIN)/python benchmarks/peers/compare.py
