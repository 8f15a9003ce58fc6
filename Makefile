# Everything sets itself up: a machine with Python (3.10 or newer) and make is enough.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.12.1
BIN := $(VENV)/bin

.PHONY: setup demo test lint test-oldest clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml src/reasonalloc/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/reasonalloc demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The newest transformers runs everything, the oldest one that is declared what touches it.
test: lint test-oldest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

$(OLDEST)/.ready: pyproject.toml src/reasonalloc/version.py Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q -e '.[dev]' \
		transformers==$(OLDEST_TRANSFORMERS)
	touch $@

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 tests/test_hf.py tests/test_refusals.py \
		tests/test_memory.py tests/test_loading.py tests/test_sampling.py tests/test_eval.py \
		tests/test_ablation.py

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
