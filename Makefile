# Everything sets itself up: a machine with Python (3.10 or newer) and make is enough.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.12.1
KVPRESS := .venv-kvpress
BIN := $(VENV)/bin

.PHONY: setup demo test lint test-oldest bench bench-kvpress clean

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

# Speed on this machine, random weights in the shape of SmolLM2-135M: about 25 minutes on two cores.
BENCH := OMP_WAIT_POLICY=ACTIVE $(BIN)/reasonalloc bench --shape smollm2-135m --device cpu
UNEQUAL := rkv/cost(path=benchmarks/fidelity/smollm2-costs.json)/planned

bench: setup
	$(BENCH) --batch 16 --new-tokens 1500 --at 64,300 \
		--arms "rkv,$(UNEQUAL),rkv/uniform/reasonalloc,full" --out bench-batch16.json
	$(BENCH) --batch 1 --new-tokens 4000 --at 300 --arms rkv --out bench-long1.json
	$(BENCH) --batch 16 --new-tokens 4000 --at 300 --arms rkv --out bench-long16.json
	$(BIN)/python benchmarks/speed_targets.py bench-batch16.json bench-long1.json bench-long16.json

# kvpress pins its own transformers.
$(KVPRESS)/.ready:
	$(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --disable-pip-version-check -q kvpress==0.5.5 \
		'torch>=2.10,<2.14'
	touch $@

bench-kvpress: setup $(KVPRESS)/.ready
	OMP_WAIT_POLICY=ACTIVE $(BIN)/python benchmarks/kvpress/compare.py \
		--peer-python $(KVPRESS)/bin/python --out bench-kvpress.json

clean:
	rm -rf $(VENV) $(OLDEST) $(KVPRESS) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
