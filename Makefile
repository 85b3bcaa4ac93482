# mlagen's everyday commands; `make` alone lists them.

PYTHON ?= python3# makes the environment: any Python from 3.10 to 3.13
PIP_FLAGS ?=# more options for pip, such as an index that has the CPU build of torch
PYTEST_FLAGS ?= -n auto --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = $(BIN)/python -m pytest $(PYTEST_FLAGS)
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PYTEST = $(VLLM_VENV)/bin/python -m pytest $(PYTEST_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-isa test-vllm test-gpu bench-runtime lint clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv with everything pinned in requirements/dev.txt

# The stamp comes last, so an install that fails is tried again.
$(STAMP): pyproject.toml requirements/dev.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: PYTHON=$(PYTHON) is no Python 3.10 or newer; name one, as in: make venv PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && [ -z "$(PIP_FLAGS)$$PIP_INDEX_URL$$PIP_EXTRA_INDEX_URL$$PIP_FIND_LINKS" ]; then \
	  echo "make: torch may come as a CUDA build of several GB; CONTRIBUTING.md says how to get the small CPU build"; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: venv ## build DeepSeek-R1 at TP 8 for gfx942 and gfx950, and verify both on the CPU
	$(BIN)/mlagen build deepseek-r1 --tp 8 --arch gfx942 --arch gfx950 --out build/demo
	$(BIN)/mlagen verify deepseek-r1 --tp 8 --arch gfx942
	$(BIN)/mlagen verify deepseek-r1 --tp 8 --arch gfx950
	$(BIN)/mlagen inspect build/demo

test: venv ## run the whole test suite, the fast tests first
	$(PYTEST) tests/unit
	$(PYTEST) tests --ignore=tests/unit

test-isa: venv ## run the machine code in tinygrad's emulator; TINYGRAD_ROOT names a checkout
	@[ -f "$$TINYGRAD_ROOT/test/mockgpu/amd/emu.py" ] || \
	  { echo "make: no test/mockgpu/amd/emu.py in TINYGRAD_ROOT='$$TINYGRAD_ROOT'; name a tinygrad source checkout" >&2; exit 1; }
	$(PYTEST) tests/isa

test-vllm: $(VLLM_STAMP) ## run the plugin in real vLLM on the CPU, as if on gfx942 and on gfx950
	VLLM_TEST_ARCH=gfx942 $(VLLM_PYTEST) tests/vllm
	VLLM_TEST_ARCH=gfx950 $(VLLM_PYTEST) tests/vllm

# An environment of its own: vLLM brings eighty packages that mlagen does not need.
$(VLLM_STAMP): pyproject.toml requirements/vllm.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: PYTHON=$(PYTHON) is no Python 3.11 or newer, which requirements/vllm.txt needs" >&2; exit 1; }
	@$(VLLM_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) --no-deps -r requirements/vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-gpu: venv ## run every device test on the GPU that torch sees
	$(BIN)/python -m pytest tests/gpu

bench-runtime: venv ## time compiling, loading, calling and replaying
	$(BIN)/python benchmarks/runtime.py

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what builds and tests left behind
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mlagen tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-vllm too
	rm -rf $(VENV) $(VLLM_VENV)
