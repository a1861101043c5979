# Two commands: make run, make test. Everything they need is installed into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test fast lint types deployment mutants study bench help
help:
	@echo "make run    the default federation; another: make run ARGS=\"-c 'method=\\\"rolora\\\"'\""
	@echo "make test   lint, types, every test    make fast   the quick tests only"
	@echo "make deployment  SuperLink and SuperNodes with TLS, as docs/deployment.md says"
	@echo "make bench  the private step against stock PEFT and Opacus, ARGS='--quick' for a look"

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet -e '.[demo,dev]'
	@touch $@

run: $(VENV)/.run
	$(BIN)/lalora run . $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

fast: $(VENV)/.dev
	$(BIN)/pytest -m "not slow and not wide" -n auto

test: lint types
	$(BIN)/pytest -m "not slow" -n auto
	$(BIN)/pytest tests/test_mutants.py -n auto
	$(BIN)/pytest -m "slow and not deployment" --ignore tests/test_mutants.py

deployment: $(VENV)/.dev
	$(BIN)/pytest -m deployment

mutants: $(VENV)/.dev
	$(BIN)/pytest tests/test_mutants.py

study: $(VENV)/.run
	$(BIN)/lalora compare configs/bench/sms-spam.toml

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/private_step.py $(ARGS)
