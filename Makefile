# `make dashboard` is all that a fresh machine needs: it creates .venv, installs, and serves.

VENV    ?= .venv
BIN     := $(VENV)/bin
CPU_TORCH := https://download.pytorch.org/whl/cpu

# The first interpreter that fits; set PYTHON=/path/to/python to choose another.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PYTHON  ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python3.10,\
             $(shell $(name) -c '$(SUPPORTED)' 2>/dev/null && echo $(name))))

.PHONY: help dashboard lab test check format bench bench-profiler coverage glyphs train records results headlines clean
.DELETE_ON_ERROR:

help:
	@echo "make dashboard   install, and serve the dashboards"
	@echo "make lab         the same notebooks in JupyterLab"
	@echo "make test        everything: unit, properties, notebooks, browser"
	@echo "make check       lint, formatting, notebooks without outputs"
	@echo "make format      format code and notebooks, strip outputs"
	@echo "make bench       time the dashboards in a real browser"
	@echo "make bench-profiler   put the profiler to the test: repeats, agreement, overhead, scenarios (a quiet machine)"
	@echo "make coverage    try five techniques on every classification model of torchvision (hours; goes on where it was)"
	@echo "make glyphs      build the embedded data set again"
	@echo "make train       train the shipped models again"
	@echo "make records     measure the sweeps that the notebooks quote, where they are out of date"
	@echo "make results     train what panels show at once, where it is missing (an hour or two)"
	@echo "make headlines   compress the LeNets as far as they go, where the files are missing (twenty minutes)"
	@echo "make clean       delete .venv and what tools leave behind; unfinished trainings in runs/ stay"

dashboard: $(VENV)/.installed
	@$(BIN)/workbench dashboard $(if $(PORT),--port $(PORT)) $(ARGS)

lab: $(VENV)/.installed
	@$(BIN)/workbench lab $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id $(wildcard notebooks/*.ipynb)
	$(BIN)/python -m pytest tests/test_project.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout --keep-id $(wildcard notebooks/*.ipynb)

bench: $(VENV)/.test
	$(BIN)/python scripts/bench.py $(ARGS)

bench-profiler: $(VENV)/.test
	$(BIN)/python scripts/bench_profiler.py $(ARGS)

coverage: $(VENV)/.test
	$(BIN)/python scripts/coverage.py $(ARGS)

glyphs: $(VENV)/.dev
	$(BIN)/python scripts/build_glyphs.py $(ARGS)

train: $(VENV)/.installed
	for name in glyphs-cnn lenet-300-100 lenet-5; do $(BIN)/workbench train $$name $(ARGS) || exit; done
	$(BIN)/python scripts/train_students.py

records: $(VENV)/.installed
	$(BIN)/python scripts/make_records.py $(ARGS)

results: $(VENV)/.installed
	$(BIN)/python scripts/make_results.py $(ARGS)

headlines: $(VENV)/.installed
	$(BIN)/python scripts/make_headlines.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

# --- the environment: each stamp is made once, and again when pyproject.toml changes ---

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "The workbench needs Python 3.10 to 3.13 with its venv module, and found none$(if $(PYTHON), in $(PYTHON))."; \
	  echo "Install it (Debian, Ubuntu: sudo apt install python3-venv; else https://www.python.org/downloads),"; \
	  echo "or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@echo "Creating $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip \
	  || echo "pip stays as it is: no newer one could be fetched."

# Without an NVIDIA GPU on Linux, torch for processors only is 200 MB instead of 3 GB. One short try, user's pip
# settings left out so that the answer comes from PyTorch's own index or not at all; otherwise the default index serves.
$(VENV)/.torch: | $(BIN)/python
	@if [ "$$(uname -s)" != Linux ] || [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1; then :; \
	elif $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then :; \
	elif echo "No NVIDIA GPU here: asking PyTorch's index for the smaller, CPU-only torch ..." && \
	  PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= $(BIN)/python -m pip install --quiet \
	    --disable-pip-version-check --timeout 10 --retries 0 --index-url $(CPU_TORCH) torch torchvision 2>/dev/null; \
	then echo "CPU-only torch is installed."; \
	else echo "PyTorch's index is out of reach; the default index serves torch instead."; fi
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	@echo "Installing the workbench into $(VENV); the first time this takes some minutes ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.torch
	@echo "Installing the workbench and its test tools into $(VENV); the first time this takes some minutes ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	@touch $@ $(VENV)/.test $(VENV)/.installed
