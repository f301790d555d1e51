# Every target makes the environment it needs first; scripts/bootstrap.py does so, and leaves alone what is up to date.
#   make test VENV=/elsewhere PYTHON=python3.12 ARGS="-k cpu"
VENV ?= .venv
PYTHON ?= python3
# Another torch than the one in scripts/bootstrap.py, e.g. torch==2.11.0; to be given every time.
TORCH ?=
ARGS ?=
BIN := $(VENV)/bin
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PY_FILES := $(wildcard mnp_fast tests benchmarks scripts setup.py)

# Idle threads that spin take the cores from those that work: seen to cost a factor of 25 on two cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: help env demo test sanitize lint format clean

help:
	@echo "make demo      repair a small backdoored network, and leave a clean one alone"
	@echo "make test      all tests"
	@echo "make sanitize  tests of the CPU kernels with address and undefined-behaviour sanitizers"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    rewrite the files as lint wants them"
	@echo "make clean     remove what was built (the environment stays: remove $(VENV) by hand)"

env:
	@$(PYTHON) scripts/bootstrap.py --venv $(VENV) --torch '$(TORCH)'

demo: env
	@$(BIN)/python -m benchmarks.demo

test: env
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

sanitize: env
	@PATH="$(abspath $(BIN)):$$PATH" PYTHON="$(abspath $(BIN))/python" scripts/sanitize.sh $(ARGS)

lint: env
	$(BIN)/python -m ruff check $(PY_FILES)
	$(BIN)/python -m ruff format --check $(PY_FILES)
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: env
	$(BIN)/python -m ruff check --fix-only --quiet $(PY_FILES)
	$(BIN)/python -m ruff format $(PY_FILES)
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache mnp_fast/*.so
	find $(filter-out %.py,$(PY_FILES)) -name __pycache__ -prune -exec rm -rf {} +
