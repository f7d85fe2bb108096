PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Two threads that wait for each other by spinning make small models crawl on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all check format generate pictures clean help

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 12

demo: $(READY)  ## train LeNet on real images from a JSON config, and show how it went
	$(BIN)/onecycle validate examples/fashion_mnist/ds_config.json
	$(BIN)/python examples/fashion_mnist/train.py

test: $(READY)  ## run the tests, but for the slow ones
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY)  ## run all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu"

check: $(READY)  ## lint, types, layers, generated files, doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate.py --check
	$(BIN)/python -m pytest --doctest-modules engine schedules schemas --durations=0

format: $(READY)  ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: $(READY)  ## write the files that are generated from the code
	$(BIN)/python tools/generate.py

pictures: $(READY)  ## draw the pictures of the schedules' reference page
	$(BIN)/python tools/generate.py --pictures

clean:  ## remove the virtual environment and what runs left
	rm -rf $(VENV) run *.egg-info

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	$(BIN)/python -m compileall -q engine schedules schemas
	touch $(READY)
