# Everything happens in .venv, which is made once. PYTHON chooses the interpreter: make demo PYTHON=python3.11
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What else has a long form.
LONG := $(addprefix tests/test_,$(addsuffix .py,servers servers_redis command_servers reload_servers redis redis_sentinel cluster cluster_failover cluster_waiting memory host decorators lifetime keys shadow renewals queueing waiting_requests waiting_servers docs hold resilience greenlets soak))

.DEFAULT_GOAL := help
.PHONY: help demo demo-redis test chaos soak bench bench-quick test-all check docs schema clean

help:
	@echo "make demo        start the example site under real servers, send bursts, see the caps hold"
	@echo "make demo-redis  the same on two servers at once, with one Redis and one cap (needs redis-server)"
	@echo "make test        run the test suite"
	@echo "make chaos       all of the chaos suite, of which make test runs a part (ten minutes)"
	@echo "make soak        a day in production: servers and Redis that fail over for ten minutes, and a report"
	@echo "make bench       what the limits cost, beside two raw round trips, another limiter, and bare servers under load"
	@echo "make bench-quick the ratios of it that a change could spoil (a minute)"
	@echo "make test-all    run it on every supported Python and Django, every redis-py and other servers (45 minutes)"
	@echo "make check       ruff, mypy, import-linter, and the docs"
	@echo "make docs        build the docs into docs/_build/html; a wrong reference is an error"
	@echo "make schema      write anew what is made from the table of policy fields"
	@echo "make clean       remove what these made, the virtual environments included"

demo: $(VENV)/.demo-stamp
	@$(BIN)/python example_project/demo.py

demo-redis: $(VENV)/.demo-stamp
	@$(BIN)/python example_project/demo.py --redis

# Two workers, however many processors there are: the tests wait half of their time, and more would disturb those with a clock.
test: $(VENV)/.dev-stamp
	@$(BIN)/python -m pytest -n 2

# Ports, files and processes are its own, so it can run beside other things; it wants an idle machine all the same.
chaos: $(VENV)/.dev-stamp
	@CHAOS=long $(BIN)/python -m pytest tests/chaos $(LONG)

# One store, or shorter: make soak SOAK="--only cluster --seconds 120"
soak: $(VENV)/.dev-stamp
	@$(BIN)/python -m tests.soak $(SOAK)

# The figures and the plot are those of the docs. Part of it: make bench BENCH="--only redis-sync" (see --help and --list)
bench: $(VENV)/.bench-stamp
	@$(BIN)/python -m benchmarks --json docs/performance.json --svg docs/performance.svg $(BENCH)

bench-quick: $(VENV)/.bench-stamp
	@$(BIN)/python -m benchmarks --quick $(BENCH)

# One session of it: make test-all NOX="-s redis"
test-all: $(VENV)/.dev-stamp
	@$(BIN)/python -m nox $(NOX)

check: $(VENV)/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory docs

docs: $(VENV)/.dev-stamp
	$(BIN)/sphinx-build -W -n -q -j auto -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

schema: $(VENV)/.dev-stamp
	@$(BIN)/python -m django_concurrency_mw.schema > django_concurrency_mw/policies.schema.json
	@$(BIN)/python docs/generate.py

$(VENV)/.demo-stamp: pyproject.toml | $(BIN)/python
	@echo "Installing what the demo needs into $(VENV)"
	@$(PIP) install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml | $(BIN)/python
	@echo "Installing what the tests and checks need into $(VENV)"
	@$(PIP) install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.demo-stamp

$(VENV)/.bench-stamp: pyproject.toml | $(BIN)/python
	@echo "Installing what the benchmarks compare with into $(VENV)"
	@$(PIP) install --quiet --editable ".[bench]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "The venv module is needed (Debian: apt install python3-venv)" >&2; exit 1; }

clean:
	rm -rf $(VENV) .nox build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f example_project/db.sqlite3
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
