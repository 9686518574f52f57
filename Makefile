# Every command a checkout needs. `make` lists them.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin

# A stamp's name holds a checksum of what it was made from: switching branches and touching files rebuilds nothing,
# a changed byte does.
checksum = $(shell cat $(1) | cksum | tr ' ' '-')
# Kernels in Triton are used where they lie, but that there is such a package is part of what is installed.
NATIVE_SOURCES := pyproject.toml setup.py CMakeLists.txt lvlm_fastxai/ops/_operators.py triton_kernels/__init__.py $(shell find csrc -type f | LC_ALL=C sort)
RUNTIME := $(VENV)/.stamp-runtime-$(call checksum,requirements/runtime.lock requirements/build.lock)
DEV := $(VENV)/.stamp-dev-$(call checksum,requirements/dev.lock)

# Compiling for every GPU is most of the build; on a machine without one only `make cuda` and `make wheel` do it.
export LVLM_FASTXAI_CUDA ?= $(if $(shell command -v nvidia-smi 2>/dev/null),AUTO,OFF)
BUILD_SWITCHES := $(LVLM_FASTXAI_NO_EXT) $(LVLM_FASTXAI_CUDA) $(LVLM_FASTXAI_CUDA_ARCHS) $(LVLM_FASTXAI_TORCH_DIR)
PACKAGE := $(VENV)/.stamp-package-$(shell (cat $(NATIVE_SOURCES); echo '$(BUILD_SWITCHES)') | cksum | tr ' ' '-')
# Threads that spin while they wait cost more than they bring when workers share cores.
export OMP_WAIT_POLICY ?= PASSIVE
# Nothing here may reach for a model hub.
export HF_HUB_OFFLINE ?= 1
# The environment's own cmake and ninja come first.
export PATH := $(abspath $(BIN)):$(PATH)
# Errors only: what pip says of an index's gaps is no use to anyone.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
# Two pips in one environment get in each other's way.
.NOTPARALLEL:
.PHONY: help demo test test-floor lint cuda triton wheel evaluate benchmark gpu train-tiny train-head clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): | $(BIN)/python
	@echo 'installing the locked packages (a few minutes where torch has to be downloaded)'
	$(PIP) install -r requirements/runtime.lock -r requirements/build.lock
	@rm -f $(VENV)/.stamp-runtime-* && touch $@

$(DEV): | $(RUNTIME)
	$(PIP) install -r requirements/dev.lock
	@rm -f $(VENV)/.stamp-dev-* && touch $@

# Editable: the library is built in place, and Python sources are used where they lie.
$(PACKAGE): | $(RUNTIME)
	@echo 'building the native library'
	$(PIP) install --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.stamp-package-* && touch $@

demo: | $(PACKAGE)  ## set up, and explain the shipped picture with the shipped model
	@$(BIN)/lvlm-fastxai explain lvlm_fastxai/tiny/sample.png \
	  "$$($(BIN)/python -c 'from lvlm_fastxai.tiny import SAMPLE_QUESTION; print(SAMPLE_QUESTION)')" --out out/demo

test: | $(DEV) $(PACKAGE)  ## set up, and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --timeout 300 $(PYTEST_ARGUMENTS)

# The floor's packages lie over the development environment, in a folder of their own.
FLOOR := .cache/floor-$(call checksum,requirements/floor.lock)
$(FLOOR): | $(DEV)
	@rm -rf .cache/floor-*
	$(PIP) install --no-deps --target $@.part -r requirements/floor.lock && mv $@.part $@

FLOOR_TESTS := $(addprefix tests/test_, relevancy_product.py sweep.py glimpse.py oracles.py families.py pruning.py recording.py sharding.py tiny.py fastrm.py)
test-floor: | $(FLOOR) $(PACKAGE)  ## the tests that meet transformers, against the oldest supported one
	@PYTHONPATH=$(FLOOR) $(BIN)/python -c 'from importlib.metadata import version; print("transformers", version("transformers"))'
	PYTHONPATH=$(FLOOR) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --timeout 300 $(FLOOR_TESTS)

lint: | $(DEV)  ## style, types, C++ layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports silent tests/typed_example.py

# setup.py's own build folder is used, so nothing that `make test` has compiled is compiled again.
cuda: | $(DEV) $(PACKAGE)  ## compile the CUDA kernels for every supported architecture and look at the machine code (skipped without nvcc, but not in CI)
	@if ! command -v nvcc >/dev/null; then \
	  echo 'cuda: no nvcc on PATH, the CUDA kernels were NOT compiled'; test "$$CI" != true; exit; fi; \
	set -e; LVLM_FASTXAI_CUDA=ON LVLM_FASTXAI_CUDA_ARCHS= $(BIN)/python setup.py --quiet build_ext --inplace >build/cuda.log 2>&1 \
	  || { cat build/cuda.log; exit 1; }; \
	for source in csrc/cuda/*.cu; do \
	  ninja -C build/cmake-* -t compdb | grep -q "$$source" || { echo "cuda: CMakeLists.txt does not build $$source"; exit 1; }; \
	done; \
	$(BIN)/python .ci/cuda_kernels.py build/cmake-*/_C.so; \
	echo csrc/cuda/*.cu compiled for $$($(BIN)/python -c \
	  'from lvlm_fastxai import _native; print(*_native.build_info()["cuda_architectures"])')

triton: | $(DEV) $(PACKAGE)  ## compile the Triton kernels for every supported architecture (skipped without triton, but not in CI)
	@if ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  echo 'triton: not installed, the Triton kernels were NOT compiled'; test "$$CI" != true; exit; fi; \
	TRITON_CACHE_DIR=.cache/triton $(BIN)/python .ci/cubins.py --document docs/triton.md

wheel: | $(DEV)  ## build a wheel, install it in clean environments elsewhere and try it there
	PYTHON=$(PYTHON) .ci/wheel $(abspath $(BIN)/python)

evaluate: | $(DEV) $(PACKAGE)  ## measure the maps against known evidence, and rewrite docs/evaluation.md
	$(BIN)/lvlm-fastxai evaluate --document docs/evaluation.md

benchmark: | $(DEV) $(PACKAGE)  ## time the operators and whole explanations
	$(BIN)/python -m pytest benchmarks/ops/bench_*.py --benchmark-only
	$(BIN)/python -m benchmarks op
	$(BIN)/python -m benchmarks end-to-end

# With the machine's own Python (an environment that was made here comes first on PATH): on a machine that is lent for
# half an hour nothing is installed.
gpu:  ## on a machine with a GPU, offline: build in place, test, sanitize, benchmark, in nine minutes (elsewhere a rehearsal)
	$(PYTHON) -m benchmarks gpu $(GPU_ARGUMENTS)

train-tiny: | $(DEV) $(PACKAGE)  ## train the shipped model from its seed (hours on two cores)
	$(BIN)/python -m lvlm_fastxai.tiny.train

# Two kinds of question are kept from the head, to see what it makes of them.
UNSEEN := position,relation
MAPS := $(BIN)/lvlm-fastxai fastrm build-maps --batch 64 --shard-size 64
train-head: | $(DEV) $(PACKAGE)  ## exact maps, the head that ships with the shipped model, its evaluation (an hour on two cores)
	$(MAPS) 'scenes:train?count=8000&seed=100&without=$(UNSEEN)' --out out/fastrm/train
	$(MAPS) 'scenes:validation?count=800&seed=50&without=$(UNSEEN)' --out out/fastrm/validation
	$(MAPS) 'scenes:held-out?count=1600&seed=500&without=$(UNSEEN)' --out out/fastrm/seen
	$(MAPS) 'scenes:held-out?count=800&seed=501&kinds=$(UNSEEN)' --out out/fastrm/unseen
	$(BIN)/lvlm-fastxai fastrm train out/fastrm/train --validation out/fastrm/validation --out lvlm_fastxai/fastrm/shipped --log out/fastrm/log
	$(BIN)/lvlm-fastxai fastrm evaluate seen=out/fastrm/seen unseen=out/fastrm/unseen --out out/fastrm

clean:  ## remove what was built and the environment; training state stays
	rm -rf $(VENV) .cache/floor-* build dist out *.egg-info lvlm_fastxai/*.so lvlm_fastxai/triton_kernels
