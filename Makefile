# Two commands to know: `make demo` and `make test`. Both set up .venv by themselves; a second run installs nothing.

PYTHON    ?= python3
VENV      := .venv
BIN       := $(VENV)/bin
LOCK      := containers/requirements.lock
MACHINES  := x86_64 aarch64
SOURCES   := deepspeed|rouge-score|sqlitedict|word2number
TARGET     = --python-version 3.11 --python-platform $*-manylinux_2_28
PIP       := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(LOCK)

WORKERS ?= 2

export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: demo test test-all lint faults docs lock schema clean help

demo: $(VENV)/.train data/demo/text  ## train a small model from raw text, on this machine
	$(BIN)/pipeline run configs/demo.yaml

test: $(VENV)/.dev data/demo/text  ## the fast tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not browser and not container and not cluster and not timing"

test-all: $(VENV)/.dev data/demo/text  ## every test; needs Debian's chromium, chromium-driver and g++
	$(BIN)/python -m pytest

faults: $(VENV)/.dev  ## 500 faults at random moments of real training; half an hour on two cores with nothing else to do
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.harness --faults 500 --seed 2 --out benchmarks/results/faults.json

lint: $(VENV)/.dev  ## linters, type checker, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

schema: $(VENV)/.dev  ## regenerate the schemas and reference pages of config and site from their code
	$(BIN)/python -m pipeline.cli.reference

docs: $(VENV)/.dev  ## build the docs as a site in build/site; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lock: $(VENV)/.dev  ## resolve the newest versions that pyproject.toml allows into the lock files
	$(BIN)/uv pip compile pyproject.toml --extra train --extra dev --universal --python-version 3.11 --upgrade \
	  --custom-compile-command "make lock" --output-file $(LOCK)
	for machine in $(MACHINES); do $(MAKE) --no-print-directory lock-$$machine || exit; done

# The locks of one machine's images, and whether every wheel in them exists; SOURCES are pure, and built by the image.
lock-%:
	mkdir -p containers/$*
	$(BIN)/uv pip compile pyproject.toml --extra train --extra evaluate $(TARGET) --constraint $(LOCK) \
	  --no-annotate --custom-compile-command "make lock: $*" --output-file containers/$*/image.lock
	echo torch | $(BIN)/uv pip compile - --no-config $(TARGET) --constraint containers/$*/image.lock \
	  --no-annotate --custom-compile-command "make lock: $*" --output-file containers/$*/cuda.lock
	grep -hvE "^($(SOURCES))==" containers/$*/image.lock containers/$*/cuda.lock | sort -u | $(BIN)/uv pip install --no-config \
	  --dry-run --quiet --no-deps --only-binary :all: $(TARGET) --target build/lock -r -

clean:  ## remove what the demo and the tests made; .venv stays
	rm -rf runs data mlflow.db mlartifacts build .pytest_cache .mypy_cache .ruff_cache .hypothesis

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

data/demo/text: | $(VENV)/.train
	$(BIN)/python -m pipeline.data.demo_text $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and by exact version, so that no other package pulls another build of it in.
$(VENV)/.train: $(LOCK) pyproject.toml | $(VENV)/bin/python
	$(PIP) "torch==2.13.0"
	$(PIP) --no-build-isolation --editable ".[train]"
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --no-build-isolation --editable ".[train,dev]"
	touch $@
