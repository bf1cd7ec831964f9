.PHONY: help dev build test bench ci lint format wheel sanitize clean
PYTHON ?= python3
SANITIZER ?= address
SANITIZER_LIBRARY = $(subst address,asan,$(subst undefined,ubsan,$(subst thread,tsan,$(SANITIZER))))
TESTS ?= tests
BUILD = build/$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h')

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

dev:             ## editable install with every development tool
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'

build:           ## compile the extension beside the sources, only what changed
	cmake -S . -B $(BUILD) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/mobilellm_fast \
	  -DPython_EXECUTABLE=$(shell command -v $(PYTHON)) \
	  -Dpybind11_DIR=$(shell $(PYTHON) -m pybind11 --cmakedir) -DMLF_SANITIZE=$(SANITIZE) $(CMAKE_ARGS)
	cmake --build $(BUILD) --parallel $(shell getconf _NPROCESSORS_ONLN)

test:            ## run TESTS (default: all)
	$(PYTHON) -m pytest $(TESTS)

bench:           ## run all benchmarks (half an hour), and write docs/benchmarks/
	$(PYTHON) -m pytest bench/ --benchmark-only --benchmark-json=benchmark.json
	$(PYTHON) bench/report.py benchmark.json

ci:              ## run everything that must be green, in fresh environments
	.ci/run

lint:            ## check the style
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)

format:          ## apply the style
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

wheel:           ## sdist and wheel in dist/
	$(PYTHON) -m build

sanitize:        ## run TESTS on a build with SANITIZER=address, undefined or thread
	$(MAKE) build SANITIZE=$(SANITIZER)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1:die_after_fork=0 OPENBLAS_NUM_THREADS=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=lib$(SANITIZER_LIBRARY).so) \
	  $$($(CXX) -print-file-name=libstdc++.so.6)" $(PYTHON) -m pytest -s $(TESTS)
	$(MAKE) build

clean:           ## remove what builds leave behind
	rm -rf build dist *.egg-info mobilellm_fast/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
