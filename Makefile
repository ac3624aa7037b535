# `make demo` and `make test` are all one needs: they create the virtual environment on first use.
# For another torch, interpreter or place: make clean, then make test TORCH=torch PYTHON=python3.12 VENV=/tmp/venv
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test lint type format benchmark clean

demo: $(STAMP)
	$(BIN)/python examples/cartpole.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(STAMP)
	$(BIN)/python -m benchmarks.throughput

clean:
	rm -rf $(VENV) runs

# torch first and by itself: its build (CPU, CUDA) is the user's choice, and the newest may bring gigabytes of CUDA packages
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
