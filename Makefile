# Each target does all its own set-up: a machine needs Python 3.11 or newer with pip, and make.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow lint format clean

demo: $(READY)  ## make a small data set, train on it, evaluate, draw what was found
	$(BIN)/deformable-detr demo

test: $(READY)  ## the quick tests
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## forget the set-up
	rm -rf .venv

# The environment, made again only when what it depends on changes. Where Python comes without ensurepip (Debian's
# python3 without python3-venv), its own pip fills the venv instead.
$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " \
	    + sys.version.split()[0] + "; name another by make PYTHON=python3.12")'
	@test -x $(BIN)/uv || $(PYTHON) -m venv .venv || $(PYTHON) -m venv --clear --without-pip .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null \
	    || $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --editable '.[demo,dev]' --constraint constraints.txt
	@touch $@
