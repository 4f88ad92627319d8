# Every target makes what it needs. A machine with Python, make and git is enough.
#   make demo    set up, look inside the embedded model, print the path of the page
#   make test    the same set-up with the test extras, then the tests
#   make check   lint, types, import directions, then make test: what CI runs
#   make bench   timings on this machine (never part of the tests)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TEXT   ?= When Mary and John went to the store, John gave a drink to Mary. When Alice and Robert went to the park, Robert gave a flower to Alice.
JOBS   ?= 2

.PHONY: demo test check lint types imports bench clean

demo: $(VENV)/.base
	@mkdir -p demo
	$(BIN)/mambascope scope "$(TEXT)" --out demo/scope.html

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -q

check: lint types imports test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(BIN)/python -m tests.bench.bench_cpu
	$(BIN)/python -m tests.bench.bench_model

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
