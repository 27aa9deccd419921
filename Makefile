# SPDX-License-Identifier: Apache-2.0
# All commands of the project; `make help` lists them. `make demo` and `make test` require only python3 >=
# 3.10 with venv, and a C++20 compiler. They set up .venv (torch from the package index, the build) first.

PYTHON ?= python3
VENV ?= .venv
# The torch requirement for pip, e.g. TORCH="torch==2.11.0".
TORCH ?= torch>=2.11
# Further arguments of the command: make test ARGS="-k meter"
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py tools/nvcc_launcher.py adacache_kernels/_schemas.py

.PHONY: help demo test coverage test-toolchain test-full test-slow test-matrix test-property property-full property-compiled property-triton \
  sanitize sanitize-full mutation mutation-full bench soak \
  build wheel wheels release docs docs-serve lint format kernel-report abi-check gpu clean distclean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo 'make demo           generate videos with and without caching: adacache_demo/report.html'
	@echo 'make test           run the tests, except slow ones'
	@echo 'make coverage       run the tests, and list the lines of the Python layer that they do not run'
	@echo 'make test-toolchain compile the Triton kernels ahead of time, and run them in the interpreter'
	@echo 'make test-full      run all cases of the tests of which `make test` runs a sample'
	@echo 'make test-slow      run the tests that take minutes each'
	@echo 'make test-matrix    run the op and layer tests under torch 2.11, 2.14 and the newest'
	@echo 'make test-property  test hundreds of random shapes, dtypes, strides and gates per op'
	@echo 'make sanitize       run CPU library and CUDA bodies under address, undefined and thread sanitizers'
	@echo 'make mutation       plant faults in copies of the sources; the tests must catch each'
	@echo 'make property-full sanitize-full mutation-full  the same with all cases and faults: 10 to 20 minutes each'
	@echo 'make soak           random videos on the serving engine against their single runs, 10 minutes'
	@echo 'make bench          time every op: GB/s, share of a copy, speedup over eager and torch.compile'
	@echo 'make build          build in place'
	@echo 'make wheel          build a wheel with CPU and CUDA for all architectures; report size and symbols'
	@echo 'make wheels         build, tag and check a wheel per installed Python; the op libraries are built once'
	@echo 'make release        from a clean tree to checked artefacts: sdist, wheels, SHA256SUMS'
	@echo 'make docs           build the documentation site: build/site; `make docs-serve` shows it while you edit'
	@echo 'make lint           run ruff, mypy and clang-format; `make format` applies fixes'
	@echo 'make kernel-report  report registers, shared memory and spills per kernel and architecture'
	@echo 'make abi-check      test one wheel under torch 2.11 and a CPU-only torch'
	@echo 'make gpu            on a GPU: tests of cuda and triton, compute-sanitizer, benchmarks; writes JSON'
	@echo 'make clean          remove build products; `make distclean` also removes .venv'

demo: build
	$(VENV)/bin/adacache demo $(ARGS)

# One worker per core; each test uses one thread.
test: build
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

coverage: build
	$(PY) -m pytest -n auto --dist worksteal --cov --cov-report=term $(ARGS)

# Tests of Triton kernels without a GPU; `make sanitize` runs those of the CUDA bodies.
test-toolchain: build
	$(PY) -m pytest -n auto --dist loadfile -m "toolchain and not slow" tests/ops tests/layer $(ARGS)

# All cases of the tests marked with `sampled`.
test-full: build
	ADACACHE_ALL_CASES=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

test-slow: build
	$(PY) -m pytest -m slow $(ARGS)

test-matrix: build
	$(PY) tools/test_matrix.py $(ARGS)

# Random cases per op, of the compiled kernels and of Triton's interpreter.
test-property: COMPILED_CASES = 500
test-property: TRITON_CASES = 50
property-full: COMPILED_CASES = 2000
property-full: TRITON_CASES = 200

# In parallel; each uses one core.
test-property property-full: build
	$(MAKE) -j2 --output-sync=target property-compiled property-triton \
	  COMPILED_CASES=$(COMPILED_CASES) TRITON_CASES=$(TRITON_CASES)

property-compiled:
	ADACACHE_PROPERTY=$(COMPILED_CASES) $(PY) -m pytest -m property tests/property $(ARGS)

property-triton:
	TRITON_INTERPRET=1 ADACACHE_TEST_BACKEND=triton ADACACHE_PROPERTY=$(TRITON_CASES) $(PY) -m pytest -m property \
	  -W ignore::RuntimeWarning tests/property $(ARGS)

sanitize: build
	$(PY) tools/sanitize_check.py $(ARGS)

sanitize-full: build
	$(PY) tools/sanitize_check.py --full $(ARGS)

mutation: build
	$(PY) tools/mutation_check.py --quick $(ARGS)

mutation-full: build
	$(PY) tools/mutation_check.py $(ARGS)

soak: build
	$(PY) tests/serving/soak.py $(ARGS)

bench: build
	$(PY) benchmarks/kernels.py --json build/bench/kernels.json --plot build/bench/kernels.png $(ARGS)

build: $(STAMPS)/installed

$(STAMPS)/torch:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python >= 3.10 is needed; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/tools: $(STAMPS)/torch pyproject.toml
	$(PIP) install "setuptools>=77" wheel "cmake>=3.20" ninja "pybind11>=2.13"
	@touch $@

$(STAMPS)/built: $(STAMPS)/tools $(SOURCES)
	$(PY) setup.py build_ext --inplace
	@touch $@

# Editable: installs the dependencies and links the Python sources. The libraries are already built in place.
$(STAMPS)/installed: $(STAMPS)/built pyproject.toml
	$(PIP) install --no-build-isolation -e ".[demo,test]"
	@touch $@

wheel: $(STAMPS)/tools
	rm -rf dist
	ADACACHE_CUDA=1 $(PIP) wheel --no-build-isolation --no-deps -w dist .
	$(PY) tools/wheel_report.py --local dist/*.whl

$(STAMPS)/wheels: $(STAMPS)/installed
	$(PIP) install --no-build-isolation -e ".[demo,test,release]"
	@touch $@

wheels: $(STAMPS)/wheels
	rm -rf dist
	$(PY) tools/wheels.py $(ARGS)

release: $(STAMPS)/wheels
	$(PY) tools/release.py $(ARGS)

$(STAMPS)/docs: $(STAMPS)/installed
	$(PIP) install --no-build-isolation -e ".[demo,test,docs]"
	@touch $@

# Strict: a broken link, an unknown name or a page outside the navigation is an error.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

docs-serve: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve --strict $(ARGS)

$(STAMPS)/lint: $(STAMPS)/installed
	$(PIP) install --no-build-isolation -e ".[demo,test,lint]"
	@touch $@

LINTED := $(wildcard setup.py adacache_kernels python tools tests benchmarks examples)
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: $(STAMPS)/lint
	$(VENV)/bin/ruff check $(LINTED)
	$(VENV)/bin/ruff format --check $(LINTED)
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMPS)/lint
	$(VENV)/bin/ruff check --fix $(LINTED)
	$(VENV)/bin/ruff format $(LINTED)
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# ADACACHE_CUDA=1: a missing nvcc is an error.
kernel-report: $(STAMPS)/tools
	ADACACHE_CUDA=1 $(PY) setup.py build_ext --inplace
	$(PY) tools/kernel_report.py --json build/kernel_report.json

abi-check: $(STAMPS)/installed
	$(PY) tools/abi_check.py $(ARGS)

# Uses PYTHON if it meets all requirements (torch with a CUDA device, build tools, pytest), without network
# access. Otherwise sets up .venv. Example: make gpu PYTHON=python3.12
gpu:
	@if $(PYTHON) tools/gpu_check.py --can-run; then \
	  $(PYTHON) tools/gpu_check.py $(ARGS); \
	else \
	  $(MAKE) $(STAMPS)/installed && $(PY) tools/gpu_check.py $(ARGS); \
	fi

clean:
	rm -rf build dist adacache_kernels/*.so adacache_kernels/_build_info.json *.egg-info
	rm -f $(STAMPS)/built $(STAMPS)/installed

distclean: clean
	rm -rf $(VENV)
