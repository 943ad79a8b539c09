# make demo: the main job on the built-in model. make test: everything that must hold.
# Each makes .venv the first time. Another build of torch: make demo TORCH="torch==2.13.0 --index-url ADDRESS"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test clean

demo: $(READY)
	rm -rf demo-out
	$(BIN)/assay compress builtin --bits 3.5 -o demo-out
	$(BIN)/assay verify demo-out --against builtin

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf $(VENV) demo-out .demo-out.assay

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@
