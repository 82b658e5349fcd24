# Each target sets up its own environment: you need Python 3.11 or newer with pip, and make.
# For another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow lint format docs clean

demo: $(READY)  ## create a small dataset, train on it, evaluate, draw the detections
	$(BIN)/deformable-detr demo

# One PyTorch thread per worker. Tests that depend on timing run alone afterwards.
test: $(READY)  ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not alone"
	$(BIN)/python -m pytest -m "alone and not slow"

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## ruff, pyright and the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY)  ## the docs site in site/; a broken link is an error
	$(BIN)/mkdocs build --strict

clean:  ## remove the environment
	rm -rf .venv

# The environment is rebuilt only if one of these files changes. If Python lacks ensurepip (Debian without
# python3-venv), its own pip fills the venv.
$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is required, this is " \
	    + sys.version.split()[0] + "; choose another with make PYTHON=python3.12")'
	@test -x $(BIN)/uv || $(PYTHON) -m venv .venv || $(PYTHON) -m venv --clear --without-pip .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null \
	    || $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python --editable '.[demo,dev,docs]' --constraint constraints.txt
	@touch $@
