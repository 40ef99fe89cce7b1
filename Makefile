# Commands for a new machine: make demo, make test (fast), make test-all. Each creates or updates .venv first.
PYTHON ?= python3
RUN ?= runs/digits
DEMO_ARGS ?=
BIN := .venv/bin
# On Debian venv is a separate package. root installs it here; other users get a message with the command.
INSTALL_VENV = { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq "$(notdir $(PYTHON))-venv"; }

.PHONY: demo test test-all lint docs clean

demo: .venv/ready
	$(BIN)/sret train --config recipes/digits.yaml --out "$(RUN)" --resume auto $(DEMO_ARGS)
	@echo
	@echo "Accuracy on the test images, which were used neither for training nor to select the weights:"
	$(BIN)/sret eval --checkpoint "$(RUN)/best.safetensors"
	@echo
	@echo "Predictions for some images (the file name is the digit):"
	$(BIN)/sret predict examples/digits/*.png --checkpoint "$(RUN)/best.safetensors"
	@echo
	@echo "Files in $(RUN):" && ls "$(RUN)"

# The fast tests; test-all also runs those marked slow. The processes share the cores, so each uses one thread; in
# test-all the tests of a file stay in one process, because some share runs that take a minute.
test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations=20

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Builds the pages, with the API reference, into site/.
docs: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# `ready` is written last, so an interrupted installation starts again.
.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sret needs Python 3.11 or newer; choose one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(INSTALL_VENV) || \
	  { echo "$(PYTHON) cannot create virtual environments; run: sudo apt install $(notdir $(PYTHON))-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch .venv/ready

clean:
	rm -rf .venv runs site
