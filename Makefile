# Everything a newcomer types. Needs Python 3.10 or newer, git and make; each target makes the environment that it needs.
#   make toy    text to a trained 96-expert model and its report         make lab    the chapters in JupyterLab
#   make test   every law in minutes; make test-slow the rest              make book   the book as an offline site, with slides
#   make bench  side-by-side benchmarks on this machine                  make clean  remove what these commands made
#   make classroom  one zip for a room without a network: book, slides, chapters, packages; unpacked and tried in the end
#   make bench-gpu  every backend of the expert matmul on this GPU, checked and timed in under ten minutes
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# More arguments for pip, for instance a mirror, or the CPU package index that pytorch.org names (saves gigabytes on Linux).
PIP_ARGS ?=
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# Training times its first seconds to choose a number of threads (`threads: auto` in the config), unless it is given one:
# make toy OMP_NUM_THREADS=1. All else has one thread: tests and figures must not depend on the machine, and run side by side.
test test-slow lab book classroom bench bench-gpu: export OMP_NUM_THREADS ?= 1

# Test files run side by side in so many processes.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help toy dense test test-slow lab book classroom bench bench-gpu clean

help:
	@sed -n '2,6s/^# *//p' Makefile

$(VENV)/.core: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed: install it, or set PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing sigma_lite (a minute or two) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.full: $(VENV)/.core
	@echo "installing what tests, notebooks and book need (a minute or two) ..."
	@$(PIP) -e ".[notebooks,book,data,kernels,watch,dev]"
	@touch $@

toy: $(VENV)/.core
	@$(BIN)/sigma-lite prepare -c scaled_configs/toy.yaml
	@$(BIN)/sigma-lite fit -c scaled_configs/toy.yaml

dense: $(VENV)/.core
	@$(BIN)/sigma-lite fit -c scaled_configs/toy.yaml -c scaled_configs/overlays/dense.yaml

test: $(VENV)/.full
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb
	@$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(VENV)/.full
	@$(PYTEST) -m slow $(TESTS)

lab: $(VENV)/.full
	@$(BIN)/jupyter lab notebooks/01_text_to_rows.ipynb

book: $(VENV)/.full
	@$(BIN)/python book/build.py

# What a room installs from: the chapters' packages and what builds ours, for this system and this Python.
WHEELS := book/_build/wheels
$(WHEELS)/.done: $(VENV)/.full
	@echo "fetching the packages for $(WHEELS) ..."
	@rm -rf $(WHEELS)
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check -w $(WHEELS) -c constraints.txt $(PIP_ARGS) ".[notebooks,kernels]" hatchling editables
	@rm -f $(WHEELS)/sigma_lite-*.whl
	@touch $@

classroom: $(WHEELS)/.done
	@$(BIN)/python book/classroom.py $(FAST)
	@$(BIN)/python book/tried.py

bench: $(VENV)/.full
	@$(BIN)/python benchmarks/train_step.py --theirs grouped_mm eager
	@$(BIN)/python benchmarks/experts.py

bench-gpu: $(VENV)/.full
	@$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) data runs book/_build build dist
