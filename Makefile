# make demo    quantize the embedded model, audit it, load it with Transformers
# make test    lint, types, tests
# make lint    format and lint alone (lint, types)
# make test-gpu   kernels for the GPU at hand, its tests and benchmarks; needs nvcc and a torch built with CUDA
# make memcheck, make racecheck   those ops under compute-sanitizer
# make build   what these need: .venv with torch and the installed package
#
# All that has to be there is Python >= 3.10 with venv, a C++20 compiler, make and the network.
#   PYTHON   interpreter that .venv is made from         VENV    where the environment lies
#   TORCH    requirement that pip gets for torch          PYTEST_ARGS   passed on, e.g. PYTEST_ARGS="-k abi"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
SOURCES := $(shell find csrc cmake python -type f -not -name '*.so' -not -name '*.pyc' -not -name '_build.json')
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build demo test test-gpu memcheck racecheck lint format clean

build: $(VENV)/.installed

# One stamp for each TORCH: another one is installed over the last, and all that is built on it is built again.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
$(TORCH_STAMP):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "quantkit needs Python >= 3.10; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@# torch before anything that depends on it, which would otherwise choose the version
	$(PIP) '$(TORCH)'
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/.tools: $(TORCH_STAMP) Makefile
	$(PIP) 'scikit-build-core>=1.0' 'pybind11>=3.0' ninja
	@# a system cmake serves if it is new enough
	@cmake --version 2>/dev/null | awk 'NR == 1 { split($$3, v, "."); new = v[1] * 100 + v[2] >= 325 } END { exit !new }' \
	    || $(PIP) cmake
	touch $@

$(VENV)/.installed: $(VENV)/.tools pyproject.toml CMakeLists.txt $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation '.[test,demo]'
	touch $@

demo: build
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Only the architecture of this device is compiled. The benchmarks print; what is kept of it goes to docs/benchmarks.md.
# tools/gpu.sh does the same with an interpreter that has all it takes, without network or an environment of its own.
test-gpu: $(VENV)/.tools
	@command -v nvcc >/dev/null || { echo 'make test-gpu needs nvcc on PATH' >&2; exit 1; }
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make test-gpu: torch {torch.__version__} sees no GPU; set TORCH=")'
	$(PIP) pytest numpy
	PYTHON=$(BIN)/python bash tools/gpu.sh build layouts test ops gemm attention

# Each op once under compute-sanitizer, after make test-gpu.
memcheck racecheck:
	PYTHON=$(BIN)/python bash tools/gpu.sh $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build
