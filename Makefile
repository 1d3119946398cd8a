# make demo: quantize, measure and run the built-in model.  make test: the tests.  Both set up $(VENV) first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
PACKAGES := minibble quantize runtime calibrate cli
SOURCES := $(PACKAGES) tests benchmarks tools

.PHONY: demo test check lint docs interop dev clean

demo: $(READY)
	$(BIN)/minibble demo --out .demo

test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

check: lint test

lint: $(TESTABLE) dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python tools/make_cli_docs.py --check
	$(BIN)/python tools/make_performance.py --check

docs: $(TESTABLE)
	$(BIN)/python tools/make_cli_docs.py
	$(BIN)/python tools/make_performance.py

# The files as other tools read them, each tool in an environment of its own under .interop/.
interop: $(READY)
	$(BIN)/python tools/interop.py

# The packages as type checkers look for them: one folder named minibble.
dev: $(TESTABLE)
	@mkdir -p .typing/minibble
	@ln -sfn $(CURDIR)/minibble/__init__.py .typing/minibble/__init__.py
	@ln -sfn $(CURDIR)/minibble/py.typed .typing/minibble/py.typed
	@for package in quantize runtime calibrate cli; do ln -sfn $(CURDIR)/$$package .typing/minibble/$$package; done

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minibble needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "no virtual environment could be made: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	@touch $@

$(TESTABLE): $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@touch $@

clean:
	rm -rf .demo .typing build *.egg-info .pytest_cache .mypy_cache .ruff_cache
