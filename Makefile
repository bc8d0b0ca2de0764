# One verb for each habit. `make` lists them.
#
#   make setup PYTHON=python3.12      another interpreter for .venv
#   make setup TORCH='torch'          another PyTorch (any pip arguments)
#   make test ARGS='-k packing'       arguments for pytest

PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY     := $(BIN)/python
PIP    := $(PY) -m pip --disable-pip-version-check
CSRC   := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')


.DEFAULT_GOAL := help
.PHONY: help setup test test-interop test-ray test-triton lint format bench bench-decode bench-methods bench-peers demo docs fuzz sanitize neon clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.native.stamp ## .venv with the package (editable), its native core and the developer tools

$(VENV)/.torch.stamp:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet "scikit-build-core>=0.11" "nanobind>=2.2"
	command -v cmake > /dev/null || $(PIP) install --quiet cmake
	command -v ninja > /dev/null || $(PIP) install --quiet ninja
	touch $@

# No build isolation: the build keeps its cache in build/, and only what has changed is compiled again.
$(VENV)/.native.stamp: $(VENV)/.torch.stamp pyproject.toml CMakeLists.txt $(CSRC)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

# One process for each core, one thread in each: on small tensors OpenMP teams only wait for each other.
test: setup ## all the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

# Each engine lives in an environment of its own: BITFOLD_INTEROP_VLLM=/path/to/python, and so on (docs/interop.md).
test-interop: setup ## other engines on what bitfold writes; those without an environment are skipped, and named
	OMP_NUM_THREADS=1 $(PY) -m pytest -rs tests/interop $(ARGS)

# Ray is not among the developer tools: it is large, and its tests start clusters of three machines.
test-ray: setup ## runs on a Ray cluster of three machines that are all this one (installs Ray into .venv)
	$(PY) -c "import ray" 2> /dev/null || $(PIP) install --quiet 'ray>=2.40'
	OMP_NUM_THREADS=1 $(PY) -m pytest -rs tests/run/test_ray.py $(ARGS)

test-triton: setup ## the kernels in Triton, in its interpreter where there is no device
	$(PY) -c "import triton" 2> /dev/null || $(PIP) install --quiet 'triton>=3.2'
	TRITON_INTERPRET=$$($(PY) -c 'import torch; print(int(not (torch.cuda.is_available() or torch.xpu.is_available())))') \
	  OMP_NUM_THREADS=1 $(PY) -m pytest -rs tests/kernels/test_triton.py $(ARGS)

lint: setup ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: setup ## rewrite the sources in the house style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: setup ## speed of the native core on this machine
	$(PY) benchmarks/bench_packing.py
	$(PY) benchmarks/bench_kernels.py

bench-peers: setup ## the same beside llama.cpp, PyTorch, ONNX Runtime, OpenVINO (each in its own environment)
	TORCH='$(TORCH)' $(PY) benchmarks/bench_peers.py

bench-decode: setup ## text beside llama.cpp and OpenVINO GenAI on the same models: ARGS='--model NAME=FOLDER:FILE.gguf'
	TORCH='$(TORCH)' $(PY) benchmarks/bench_decode.py $(ARGS)

bench-methods: setup ## table of all methods and bits on the demo's model, with peers (an hour a call, until all are there)
	test -d demo/original || $(PY) examples/demo.py
	TORCH='$(TORCH)' $(PY) benchmarks/bench_methods.py --minutes 60 $(ARGS)

demo: setup ## the main job on a real model, from download to generated text
	$(PY) examples/demo.py

$(VENV)/.docs.stamp: $(VENV)/.native.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet --no-build-isolation --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs.stamp ## HTML documentation in site/
	$(BIN)/sphinx-build -q -W --keep-going -b html docs site
	@echo "site/index.html"

# Atheris lives beside the environment, not in it: it is a compiler's runtime, and only this needs it.
FUZZ_SECONDS ?= 60
build/fuzz/venv/.stamp: | $(VENV)/.native.stamp
	$(PY) -m venv build/fuzz/venv
	build/fuzz/venv/bin/pip install --quiet atheris
	$(PY) -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	  > $$(build/fuzz/venv/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/bitfold.pth
	touch $@

fuzz: build/fuzz/venv/.stamp ## coverage-guided fuzzing of every reader, FUZZ_SECONDS=60 each
	build/fuzz/venv/bin/python fuzz/run.py $(FUZZ_SECONDS)

sanitize: setup ## the native tests under AddressSanitizer and UndefinedBehaviorSanitizer, threads under ThreadSanitizer
	cmake -S . -B build/sanitize -DBITFOLD_TESTS=ON -DBITFOLD_SANITIZE=ON > /dev/null
	cmake --build build/sanitize --parallel 2
	build/sanitize/bitfold_test
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -pthread -DBITFOLD_ALONE -Icsrc \
	  csrc/system/threads.cpp csrc/tests/test_threads.cpp -o build/sanitize/threads_test
	build/sanitize/threads_test

NEON_CXX ?= aarch64-linux-gnu-g++
QEMU     ?= qemu-aarch64
neon: ## the native tests on an emulated AArch64
	@command -v $(NEON_CXX) > /dev/null || { echo "make neon needs $(NEON_CXX) (Debian: g++-aarch64-linux-gnu)"; exit 1; }
	@command -v $(QEMU) > /dev/null || { echo "make neon needs $(QEMU) (Debian: qemu-user)"; exit 1; }
	cmake -S . -B build/neon -DBITFOLD_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(NEON_CXX) -DCMAKE_EXE_LINKER_FLAGS=-static > /dev/null
	cmake --build build/neon --parallel 2
	$(QEMU) -cpu max build/neon/bitfold_test scalar neon neon_i8mm

clean: ## remove what was built (not .venv)
	rm -rf build dist site $(VENV)/.native.stamp
