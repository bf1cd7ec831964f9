.PHONY: help dev build test test-kernels bench ci lint format wheel runner wheel-aarch64 \
  wheel-aarch64-manylinux runner-aarch64 arm-test arm-model fuzz sanitize clean
PYTHON ?= python3
SANITIZER ?= address
SANITIZER_LIBRARY = $(subst address,asan,$(subst undefined,ubsan,$(subst thread,tsan,$(SANITIZER))))
TESTS ?= tests
BUILD = build/$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h')

help:            ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 26

dev:             ## editable install with every development tool
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'

build:           ## compile the extension beside the sources, only what changed
	cmake -S . -B $(BUILD) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/mobilellm_fast \
	  -DPython_EXECUTABLE=$(shell command -v $(PYTHON)) \
	  -Dpybind11_DIR=$(shell $(PYTHON) -m pybind11 --cmakedir) -DMLF_SANITIZE=$(SANITIZE) $(CMAKE_ARGS)
	cmake --build $(BUILD) --parallel $(shell getconf _NPROCESSORS_ONLN)

test:            ## run TESTS (default: all)
	$(PYTHON) -m pytest $(TESTS)

test-kernels:    ## the C++ tests of the kernels, on every table that this machine runs
	cmake -S . -B build/tests -DMLF_PYTHON=OFF -DMLF_TESTS=ON $(CMAKE_ARGS)
	cmake --build build/tests --target test_kernels --parallel 2
	ctest --test-dir build/tests --output-on-failure --parallel 2

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

runner:          ## mobilellm-run for this machine, in build/runner (C API: csrc/include/mobilellm.h)
	cmake -S . -B build/runner -DMLF_PYTHON=OFF -DMLF_RUNNER=ON $(CMAKE_ARGS)
	cmake --build build/runner --target mobilellm-run test_capi --parallel 2

wheel-aarch64:   ## cross-built wheel for aarch64 Linux in dist/ (g++)
	PYTHON=$(PYTHON) arm/run wheel

wheel-aarch64-manylinux: ## the same for glibc 2.28 and newer (zig)
	PYTHON=$(PYTHON) arm/run manylinux

runner-aarch64:  ## static mobilellm-run for any aarch64 Linux or Android in dist/ (zig)
	PYTHON=$(PYTHON) arm/run runner

arm-test:        ## tests for aarch64 under emulation, at four levels
	PYTHON=$(PYTHON) arm/run test

arm-model:       ## modelled speed of ARM's inner loops, held to what is stored
	$(PYTHON) bench/arm_model.py --check

fuzz:            ## feed damaged images to the parser for FUZZ_SECONDS (60); needs clang-19
	cmake -S . -B build/fuzz -DMLF_PYTHON=OFF -DMLF_FUZZ=ON -DMLF_ONLY_ISAS=scalar \
	  -DCMAKE_CXX_COMPILER=clang++-19 -DMLF_SANITIZE=fuzzer-no-link,address,undefined
	cmake --build build/fuzz --target fuzz_image --parallel 2
	mkdir -p build/fuzz/corpus
	build/fuzz/fuzz_image -max_total_time=$(or $(FUZZ_SECONDS),60) -rss_limit_mb=2048 -timeout=20 \
	  build/fuzz/corpus tests/fuzz/corpus

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
