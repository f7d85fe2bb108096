PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Threads that wait by spinning slow small models down on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all test-long check format generate pictures clean help

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 12

demo: $(READY)  ## train LeNet on real images from a JSON config and plot the run
	$(BIN)/onecycle validate examples/fashion_mnist/ds_config.json
	$(BIN)/python examples/fashion_mnist/train.py

test: $(READY)  ## run the fast tests (under 5 minutes)
	$(BIN)/python -m pytest -m "not slow and not long and not gpu"

test-all: $(READY)  ## run the fast and the slow tests
	$(BIN)/python -m pytest -m "not long and not gpu"

test-long: $(READY)  ## run the tests that take hours: 200 kills, fuzzing with 20 times the examples
	$(BIN)/python -m pytest -m "long and not gpu"
	$(BIN)/python -m pytest -m "hypothesis and not gpu" --hypothesis-profile long

check: $(READY)  ## check lint, types, import layers, wording, generated files and doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/check_wording.py
	$(BIN)/python tools/generate.py --check
	$(BIN)/python -m pytest --doctest-modules onecycle engine schedules schemas --durations=0

format: $(READY)  ## format the code and apply the linter's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: $(READY)  ## write the files that are generated from the code
	$(BIN)/python tools/generate.py

pictures: $(READY)  ## draw the pictures of the schedule reference
	$(BIN)/python tools/generate.py --pictures

clean:  ## remove the virtual environment and the output of runs
	rm -rf $(VENV) run *.egg-info

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	$(BIN)/python -m compileall -q onecycle engine schedules schemas
	touch $(READY)
