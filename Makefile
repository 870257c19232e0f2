# Everything runs in .venv, which the first command makes; later ones reuse it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test test-slow check format clean

help:
	@echo "make demo       train, attack, score and rank four models on real digits (2 to 3 minutes on 2 cores)"
	@echo "make test       the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make check      lint, format, types, layout"
	@echo "make install    robustlab alone, into .venv"

.venv/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,torchattacks,tensorboard]"
	touch .venv/.core $@

install: .venv/.core

demo: .venv/.core
	$(BIN)/python scripts/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest -n 2

test-slow: .venv/.dev
	$(BIN)/python -m pytest -n 2 -m slow

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contract/test_arrows.py
	$(BIN)/robustlab validate configs

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
