# Plain venv and pip. Each target sets up .venv by itself; a second call does no set-up again.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
EMBEDDED := $(VENV)/.embedded
STUDY := skipgpt layer_selection
# Two processes of one thread: tiny models gain nothing from threads.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal

.PHONY: help setup sweep test test-slow bench routers study lint clean

help:
	@echo "make setup      create $(VENV), install the project, bring the embedded model and data"
	@echo "make sweep      run the default sweep on the embedded model"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make bench      measure what the runtime costs and saves"
	@echo "make routers    train the shipped routers and adapters again (about an hour)"
	@echo "make study      test published claims on the embedded model (some hours); STUDY names one"
	@echo "make lint       check style and types"
	@echo "make clean      remove $(VENV) and build outputs; runs, results and the cache stay"

setup: $(EMBEDDED)

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dyndepth needs Python 3.11 or newer, $(PYTHON) is not; say make PYTHON=/path/to/python3.11" >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

$(EMBEDDED): $(INSTALLED)
	$(RUN) -m dyndepth.assets
	@touch $@

sweep: setup
	$(RUN) -m dyndepth.sweep --methods skipgpt,early_exit,uls

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m slow

bench: setup
	$(RUN) -m dyndepth.bench

routers: setup
	$(RUN) -m dyndepth.methods.skipgpt.ship
	$(RUN) -m dyndepth.recovered --methods skipgpt --speedups 1.1,1.25,1.5,2.0 --ship

study: setup
	for name in $(STUDY); do $(RUN) -m dyndepth.studies $$name || exit 1; done

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
