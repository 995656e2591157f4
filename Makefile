# Plain venv and pip. Each target sets up .venv by itself; a second call does no set-up again.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
EMBEDDED := $(VENV)/.embedded
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed
STUDY := skipgpt layer_selection
RESULTS := embedded bounds
# Two processes of one thread: tiny models gain nothing from threads.
MINUTES ?= 10
PYTEST := pytest -q -rs -n 2 --dist worksteal

.PHONY: help setup sweep test test-slow requests test-oldest test-portable faults bench gpu docs results notebooks routers study lint audit clean

help:
	@echo "make setup      create $(VENV), install the project, bring the embedded model and data"
	@echo "make sweep      run the default sweep on the embedded model"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make requests   compare scores and texts with lm-eval's own model, over kinds of tokenizers"
	@echo "make test-oldest run the tests with the oldest transformers that pyproject.toml allows"
	@echo "make test-portable run the tests with the arithmetic of any x86 processor, and of one with AVX2"
	@echo "make faults     kill and disturb sweeps in many ways, and see that they resume (some minutes)"
	@echo "make bench      measure what the runtime costs and saves"
	@echo "make gpu        check and measure on a GPU what can only be known there (MINUTES=10; it resumes)"
	@echo "make docs       write families, method cards, tables and all numbers of README and docs"
	@echo "make results    make results/embedded and results/bounds again (some seven hours on two cores; it resumes)"
	@echo "make notebooks  execute the notebooks into runs/notebooks"
	@echo "make routers    train the shipped routers and adapters again (about an hour)"
	@echo "make study      test published claims on the embedded model (some hours); STUDY names one"
	@echo "make lint       check style and types"
	@echo "make audit      look for weak code and for known vulnerabilities of what is installed"
	@echo "make clean      remove both venvs and build outputs; runs, results and the cache stay"

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
	OMP_NUM_THREADS=1 $(RUN) -m $(PYTEST)

test-slow: setup
	$(RUN) -m pip install --disable-pip-version-check -q -e ".[dev,ray]"
	OMP_NUM_THREADS=1 $(RUN) -m $(PYTEST) -m slow

requests: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -s -m slow tests/evaluation/test_requests.py

test-oldest: setup $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m $(PYTEST)

# A processor's kernels say in which order is added, and so how is rounded: those of torch and MKL.
test-portable: setup
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(RUN) -m $(PYTEST)
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 $(RUN) -m $(PYTEST)

# A venv that sees all of the first one, and before it the oldest transformers that
# pyproject.toml allows.
$(OLDEST_INSTALLED): pyproject.toml | setup
	$(RUN) -m venv --clear --without-pip $(OLDEST)
	$(RUN) -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/normal.pth"
	$(RUN) -m pip --python $(OLDEST)/bin/python install --disable-pip-version-check \
	  "$$(sed -n 's/^ *"\(transformers\)>=\([^,"]*\).*/\1==\2/p' pyproject.toml)"
	@touch $@

# One process: the moments at which sweeps are hit are those of a machine that does little else.
faults: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m faults tests/sweep/test_faults.py

bench: setup
	$(RUN) -m dyndepth.bench

docs: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/helpers:tests/runtime $(RUN) tests/helpers/support.py
	OMP_NUM_THREADS=1 $(RUN) -m dyndepth.pages

# Ten minutes of a GPU; the folder that comes out belongs under results/. Without make:
# python -m dyndepth.gpu.
gpu: setup
	$(RUN) -m dyndepth.gpu --minutes $(MINUTES) --methods skipgpt,early_exit,uls

notebooks: setup
	OMP_NUM_THREADS=1 $(RUN) -m jupyter nbconvert --to notebook --execute --output-dir runs/notebooks \
	  notebooks/*.ipynb

results: setup
	for run in $(RESULTS); do \
	  folder=results/$$run; \
	  $(RUN) -m dyndepth.studies $$run --output_path $$folder && \
	  $(RUN) -m dyndepth.tables $$folder --pack && \
	  $(RUN) -m dyndepth.compare $$folder --output_path $$folder && \
	  $(RUN) -m dyndepth.leaderboard $$folder --output_path $$folder && \
	  $(RUN) -m dyndepth.verify $$folder --write_manifest && \
	  $(RUN) -m dyndepth.verify $$folder --sample 5 || exit 1; \
	done

routers: setup
	$(RUN) -m dyndepth.methods.skipgpt.ship
	$(RUN) -m dyndepth.recovered --device cpu --methods skipgpt --speedups 1.1,1.25,1.5,2.0 --ship

study: setup
	for name in $(STUDY); do $(RUN) -m dyndepth.studies $$name || exit 1; done

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Status 3 of the second: the audit could not be made, or not of everything.
audit: $(INSTALLED)
	$(RUN) -m bandit --quiet -r dyndepth methods -c pyproject.toml
	$(RUN) tests/whole/audit.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
