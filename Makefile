# make demo: the main job on the built-in model. make test: everything that must hold.
# make site: these pages as a site, in site/.
# Each makes .venv the first time. Another build of torch: make demo TORCH="torch==2.13.0 --index-url ADDRESS"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test site clean

demo: $(READY)
	rm -rf demo-out
	$(BIN)/assay compress builtin --bits 3.5 -o demo-out
	$(BIN)/assay verify demo-out --against builtin

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

site: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site demo-out .demo-out.assay

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@
