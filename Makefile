# Three commands: make run, make test, make test-all. Everything they need is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Tests of one module share their fixtures: they go to the same process.
PARALLEL := -n auto --dist loadscope

.PHONY: run test test-all fast lint types deployment mutants study bench help
help:
	@echo "make run         the default federation; another: make run ARGS=\"-c 'method=\\\"rolora\\\"'\""
	@echo "make test        lint, types, and the fast tests"
	@echo "make test-all    make test, then every other test but those of make deployment"
	@echo "make fast        the fast tests alone"
	@echo "make mutants     the tests that break the privacy on purpose, alone"
	@echo "make deployment  SuperLink and SuperNodes with TLS, as docs/deployment.md says"
	@echo "make bench       the private step against stock PEFT and Opacus, ARGS='--quick' for a look"

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
	$(BIN)/pytest -m "not slow and not wide" $(PARALLEL)

test: lint types fast

# The quiet tests last and one at a time: Ray wants the cores, and kills come at random moments.
test-all: test
	$(BIN)/pytest -m "(slow or wide) and not quiet and not deployment" $(PARALLEL)
	$(BIN)/pytest -m quiet

deployment: $(VENV)/.dev
	$(BIN)/pytest -m deployment

mutants: $(VENV)/.dev
	$(BIN)/pytest tests/project/test_mutants.py -n auto

study: $(VENV)/.run
	$(BIN)/lalora compare configs/bench/sms-spam.toml

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/private_step.py $(ARGS)
