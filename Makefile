# `make quickstart` runs the three stages on a laptop's CPU; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# For a small CPU-only torch on Linux: make PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" ...
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart unit test slow browser check lowest newest docs wheel
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) $(PIP_ARGS) --editable ".[dev,docs]"
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
	$(BIN)/codespell

# `make unit` with the lowest dependencies that pyproject.toml allows, and with the newest that there are.
build/lowest.txt: pyproject.toml tools/lowest.py
	mkdir -p build
	$(PYTHON) tools/lowest.py > $@

lowest: build/lowest.txt
	$(MAKE) unit VENV=.venv-lowest CONSTRAINTS=build/lowest.txt

newest:
	$(MAKE) unit VENV=.venv-newest CONSTRAINTS=

# Wheel and source distribution in dist/, and that they work where nothing else of this repository is.
wheel: setup
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

# Links, anchors and public names are checked; the pages are in site/.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
