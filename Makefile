# Needs Python 3.10 or newer and make; everything else goes into $(VENV). `make help` lists what there is.
# Settings, e.g. `make train SEED=2`: PYTHON, VENV, PIP_FLAGS, N_PROCESSES, PYTEST_FLAGS, ENV_ID, SEED, STEPS, LOGS.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
# One more process than cores: some tests wait for others
N_PROCESSES ?= $(shell $(PYTHON) -c 'import os; print(1 + (os.cpu_count() or 1))')
PYTEST_FLAGS ?=
ENV_ID ?= Pendulum-v1
SEED ?= 1
# -1: as many as the hyperparameters say
STEPS ?= -1
LOGS ?= logs

BIN := $(VENV)/bin
FAST := not slow and not compiler and not damage and not learning and not processes
PYTEST = $(BIN)/python -m pytest -q -n $(N_PROCESSES) --dist worksteal
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
METADATA := setup.cfg pyproject.toml setup.py constraints.txt constraints-oldest.txt $(wildcard startup/*)
CHECKED := sb3_softsac tests benchmarks examples startup docs setup.py

# Stamps instead of the installed files themselves: they are there only if the whole step has succeeded
VENV_READY := $(VENV)/.stamp-venv
INSTALLED := $(VENV)/.stamp-installed
INSTALLED_DEV := $(VENV)/.stamp-installed-dev
INSTALLED_DOCS := $(VENV)/.stamp-installed-docs
INSTALLED_OLDEST := $(VENV)-oldest/.stamp-installed

.DEFAULT_GOAL := help
# Two installations into one environment at a time would break it
.NOTPARALLEL:
.PHONY: help train docs test test-fast test-slow test-oldest lint type format check-format commit-checks clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV_READY):
	@command -v $(PYTHON) > /dev/null || { echo "make: '$(PYTHON)' not found: install Python 3.10 or newer, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(INSTALLED): $(VENV_READY) $(METADATA)
	$(PIP_INSTALL) -e '.[plots]'
	@touch $@

$(INSTALLED_DEV): $(VENV_READY) $(METADATA)
	$(PIP_INSTALL) -e '.[plots,tests,dev]'
	@touch $@ $(INSTALLED)

$(INSTALLED_DOCS): $(VENV_READY) $(METADATA)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

# constraints.txt, but for the packages that are in constraints-oldest.txt
$(INSTALLED_OLDEST): $(METADATA)
	$(PYTHON) -m venv --clear $(VENV)-oldest
	awk -F == 'NR == FNR {oldest[$$1]; print; next} !($$1 in oldest)' constraints-oldest.txt constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --disable-pip-version-check -c $(VENV)-oldest/constraints.txt $(PIP_FLAGS) -e '.[plots,tests]'
	@touch $@

train: $(INSTALLED)  ## train on Pendulum-v1 (or ENV_ID=...), evaluate over 20,000 steps, draw the learning curve
	$(BIN)/python -m rl_zoo3.train --algo softsac --env $(ENV_ID) --seed $(SEED) -n $(STEPS) -f $(LOGS) --eval-freq 1000 --eval-episodes 10
	@run=$$(ls -dt $(LOGS)/softsac/$(ENV_ID)_* | head -n 1) && \
	echo "Evaluating the model in $$run" && \
	$(BIN)/python -m rl_zoo3.enjoy --algo softsac --env $(ENV_ID) -f $(LOGS) --exp-id $${run##*_} -n 20000 --no-render > $$run/evaluation.txt && \
	tail -n 3 $$run/evaluation.txt && \
	$(BIN)/python benchmarks/plot_run.py $$run -o $$run/learning_curve.png

test: $(INSTALLED_DEV)  ## run the tests, except the slow ones
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-fast: $(INSTALLED_DEV)  ## run the tests that are quick: most of what a change can break
	$(PYTEST) -m "$(FAST)" $(PYTEST_FLAGS)

test-oldest: $(INSTALLED_OLDEST)  ## run these with the oldest versions of the dependencies
	$(PYTEST:$(BIN)/%=$(VENV)-oldest/bin/%) -m "$(FAST)" $(PYTEST_FLAGS)

test-slow: $(INSTALLED_DEV)  ## run the slow tests
	$(PYTEST) -m slow $(PYTEST_FLAGS)

lint: $(INSTALLED_DEV)  ## look for mistakes in the code
	$(BIN)/python -m ruff check $(CHECKED)

type: $(INSTALLED_DEV)  ## check the types
	$(BIN)/python -m mypy sb3_softsac benchmarks startup

docs: $(INSTALLED_DOCS)  ## build the documentation in docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -E -W --keep-going -b html docs docs/_build/html

format: $(INSTALLED_DEV)  ## format the code and sort the imports
	$(BIN)/python -m ruff check --select I --fix $(CHECKED)
	$(BIN)/python -m ruff format $(CHECKED)

check-format: $(INSTALLED_DEV)  ## check that the code is formatted
	$(BIN)/python -m ruff format --check $(CHECKED)

commit-checks: check-format lint type test  ## all of the checks above, before a commit

clean:  ## remove what this file and the tools have made, logs excepted
	rm -rf $(VENV) $(VENV)-oldest build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +
