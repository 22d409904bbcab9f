# `make quickstart` runs the three stages on a laptop's CPU; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# For a small CPU-only torch on Linux: make PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" ...
PIP_ARGS ?=
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart unit test slow browser check docs
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable ".[dev,docs]"
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart.py

# Pure functions, data, rewards, the step: under a minute on two slow cores.
UNIT := functional datamodules rewards training test_private_attributes.py test_layers.py
unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not distributed" --numprocesses 2 $(addprefix tests/,$(UNIT)) \
	  --ignore tests/training/test_position.py # it resumes whole runs

# Two processes, a file of tests each at a time: as many as the two slow cores that it is meant for.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not browser" --numprocesses 2 --dist loadfile

slow: setup
	$(BIN)/python -m pytest -m slow

# Needs chromium on the path.
browser: setup
	$(BIN)/python -m pytest -m browser

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Links, anchors and public names are checked; the pages are in site/.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
