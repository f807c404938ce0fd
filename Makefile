PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
PROCESSES ?= 2
BIN := $(VENV)/bin

.PHONY: demo test test-all test-lowest bench models docs fuzz lint

# One file a process at a time, in the order of tests/conftest.py.
PYTEST := python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

demo: $(VENV)/.installed
	$(BIN)/python -m ftray.tune --config examples/demo.yaml

# Importing bitsandbytes takes each of a hundred processes a second and a half less without the compiler that it asks for.
test: $(VENV)/.installed
	TORCHDYNAMO_DISABLE=1 $(BIN)/$(PYTEST)

# The faults that are rare, and whatever else takes minutes, too; and what bitsandbytes compiles.
test-all: $(VENV)/.installed
	$(BIN)/$(PYTEST) -m "slow or not slow"

# What is neither taken nor refused in one line, for five minutes.
fuzz: $(VENV)/.installed
	FUZZ_SECONDS=300 $(BIN)/python -m pytest tests/fuzz -m slow --timeout 900

# The oldest releases of what pyproject.toml names; what those need in turn is of today.
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	DS_BUILD_OPS=0 $(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
		--editable ".[serve,test,docs]"
	$(LOWEST)/bin/$(PYTEST)

# The table of all claims of speed with their bars, from quick runs: 20 minutes on two quiet cores.
bench: $(VENV)/.installed
	$(BIN)/python -W ignore -m benchmarks

# docs/models.md for the installed transformers; families in build/models.jsonl are not tried again.
models: $(VENV)/.installed
	$(BIN)/python -W ignore -m benchmarks.models

# The site of docs/, in build/site.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[serve,test,lint,docs]"
	touch $@
