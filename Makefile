# Each command makes its own environment in .venv; set VENV=... to use another one.
VENV ?= .venv
PYTHON ?= python3
export PIP_CONSTRAINT ?= $(CURDIR)/.ci/constraints.txt
export TOKENIZERS_PARALLELISM ?= false
BIN := $(VENV)/bin

.PHONY: demo demo-vision test lint types unit clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo_text.py

demo-vision: $(VENV)/.demo
	$(BIN)/python scripts/demo_vision.py

test: lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

unit: $(VENV)/.test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
