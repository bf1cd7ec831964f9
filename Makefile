.PHONY: help dev build test ci lint format wheel sanitize clean
PYTHON ?= python3
SANITIZER ?= address
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h')

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

dev:             ## editable install with every development tool
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'

build:           ## compile the extension beside the sources, only what changed
	cmake -S . -B build/cmake -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/mobilellm_fast \
	  -DPython_EXECUTABLE=$(shell command -v $(PYTHON)) \
	  -Dpybind11_DIR=$(shell $(PYTHON) -m pybind11 --cmakedir) -DMLF_SANITIZE=$(SANITIZE) $(CMAKE_ARGS)
	cmake --build build/cmake --parallel $(shell getconf _NPROCESSORS_ONLN)

test:            ## run the tests
	$(PYTHON) -m pytest

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

sanitize:        ## run the tests that need no torch under SANITIZER=address, undefined or thread
	$(MAKE) build SANITIZE=$(SANITIZER)
	LD_PRELOAD=$$($(CXX) -print-file-name=lib$(SANITIZER:address=a)san.so) $(PYTHON) -m pytest
	$(MAKE) build

clean:           ## remove what builds leave behind
	rm -rf build dist *.egg-info mobilellm_fast/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
