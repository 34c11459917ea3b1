# `make run` answers a prompt, `make check` tests the core, `make test` everything; they set up what they need first.
MODEL ?= smollm2-135m
PROMPT ?= Name the capital of France.
ARGS ?=
JOBS ?= 2

# The prompt reaches the command through the environment: no quote, dollar or space in it is read by make or the shell.
export DOVETAIL_MODEL := $(value MODEL)
export DOVETAIL_PROMPT := $(value PROMPT)
unexport PROMPT
export TORCH_INDEX_URL PYTHON

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run serve test check lint wheel setup setup-test clean

# What `make check` tests: the parts that everything else stands on.
CHECKED := $(addprefix tests/,core techniques runtime text architecture) $(wildcard tests/layers tests/test_session*.py) tests/test_outputs.py

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo
	@echo '  MODEL=NAME           alias, Hugging Face id, folder or .gguf file (default smollm2-135m)'
	@echo '  PROMPT="..."         what `make run` asks'
	@echo '  ARGS="..."           more options for `make run` and `make serve`, e.g. ARGS="--temperature 0"'
	@echo '  TORCH_INDEX_URL=URL  wheel index from which the tests take torch (`make clean` first to change it)'

run: setup ## set up, fetch the model, answer PROMPT
	@$(BIN)/dovetail run --hints $(ARGS) "$$DOVETAIL_MODEL" -- "$$DOVETAIL_PROMPT"

serve: setup ## set up and serve MODEL over the OpenAI API
	@$(BIN)/dovetail serve $(ARGS) "$$DOVETAIL_MODEL"

test: setup-test lint ## set up, then lint, types and tests
	$(BIN)/python -m pytest -q -n $(JOBS)

check: setup-test lint ## in a minute: lint, types and the tests of the core, with fewer examples
	$(BIN)/python -m pytest -q -n $(JOBS) -m 'not slow' --hypothesis-profile=fast $(CHECKED)

lint: setup-test ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

wheel: ## build a wheel for other machines into dist/, and try it where there is no compiler
	@scripts/wheel.sh

setup:
	@scripts/setup.sh run

setup-test:
	@scripts/setup.sh test

clean: ## remove the virtual environment, the compiled library and what tools left; cached models stay
	rm -rf .venv build dist *.egg-info dovetail/_native*.so dovetail/_native.sources .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
