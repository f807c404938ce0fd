PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin

.PHONY: demo test test-lowest models lint

demo: $(VENV)/.installed
	$(BIN)/python -m ftray.tune --config examples/demo.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The oldest releases of what pyproject.toml names; what those need in turn is of today.
test-lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	DS_BUILD_OPS=0 $(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
		--editable ".[serve,test]"
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile

# docs/models.md for the installed transformers; families in build/models.jsonl are not tried again.
models: $(VENV)/.installed
	$(BIN)/python -W ignore -m benchmarks.models

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[serve,test,lint]"
	touch $@
