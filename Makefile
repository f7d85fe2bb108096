PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/demo-ready
READY := $(VENV)/ready
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
DOCS_READY := $(VENV)/docs_ready
# Threads that wait by spinning slow small models down on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE
# `make test JOBS=1` runs the tests one after the other.
JOBS ?= auto
PARALLEL := --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal

# The GPU targets use the PyTorch of this machine, because constraints.txt pins a build for the CPU.
GPU_VENV := .venv-gpu
GPU_READY := $(GPU_VENV)/ready

.PHONY: demo test test-all test-long test-gpu bench evidence benchmark-gpu check docs format generate pictures tutorial ui-bundle clean help

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 12

demo: $(DEMO_READY)  ## train LeNet on real images from a JSON config and plot the run
	$(BIN)/onecycle validate examples/fashion_mnist/ds_config.json
	$(BIN)/onecycle plot -t examples/fashion_mnist/ds_config.json
	@echo "Importing PyTorch ..."
	$(BIN)/python examples/fashion_mnist/train.py

test: $(READY)  ## run the fast tests (under 5 minutes)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not long and not gpu"

test-all: $(READY)  ## run the fast and the slow tests
	$(BIN)/python -m pytest -m "not long and not gpu"

test-long: $(READY)  ## run the tests that take hours: 200 kills, fuzzing with 20 times the examples
	$(BIN)/python -m pytest -m "long and not gpu"
	$(BIN)/python -m pytest -m "hypothesis and not gpu" --hypothesis-profile long

test-gpu: $(GPU_READY)  ## run the tests that need a GPU, with this machine's PyTorch (CPU: make test-gpu DRY_RUN=1)
	$(GPU_VENV)/bin/python -m pytest tests/gpu $(if $(DRY_RUN),--dry-run)

bench: $(READY)  ## rerun the speed benchmarks and print how long each takes
	$(BIN)/python benchmarks/run.py speed

evidence: $(READY)  ## rerun the training runs of docs/results and print how long each takes (40 to 90 minutes)
	$(BIN)/python benchmarks/run.py evidence

benchmark-gpu: $(GPU_READY)  ## measure speed and memory on a GPU (8 minutes; CPU: make benchmark-gpu DRY_RUN=1)
	$(GPU_VENV)/bin/python benchmarks/gpu.py $(if $(DRY_RUN),--dry-run)

check: $(READY)  ## check lint, types, import layers, wording, generated files and doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/check_wording.py
	$(BIN)/python tools/generate.py --check
	$(BIN)/python -m pytest --doctest-modules onecycle engine schedules schemas --durations=0

docs: $(DOCS_READY)  ## build the documentation site in build/docs/html
	$(BIN)/python tools/build_site.py

format: $(READY)  ## format the code and apply the linter's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: $(READY)  ## write the files that are generated from the code
	$(BIN)/python tools/generate.py

pictures: $(READY)  ## draw the pictures of the schedule reference
	$(BIN)/python tools/generate.py --pictures

tutorial: $(READY)  ## execute docs/tutorial.ipynb and store its outputs
	$(BIN)/python tools/run_tutorial.py

ui-bundle:  ## bundle the JavaScript libraries of `onecycle ui` and of HTML reports (needs Node.js)
	cd engine/ui/source && npm ci --no-audit --no-fund && npm run build

clean:  ## remove the virtual environment and the output of runs
	rm -rf $(VENV) $(GPU_VENV) build run *.egg-info

# The demo needs less than the tests. Its output shows the progress of the installation.
$(DEMO_READY): pyproject.toml constraints.txt setup.py
	@$(PYTHON) tools/check_python.py "$(PYTHON)"
	@echo "Installing onecycle and PyTorch in $(VENV), which takes a few minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[examples,plot]'
	$(BIN)/python -m compileall -q onecycle engine schedules schemas
	touch $(DEMO_READY)

$(READY): $(DEMO_READY)
	@echo "Installing the packages of the tests ..."
	$(INSTALL) --quiet -e '.[dev,examples,plot,tensorboard,ui]'
	touch $(READY)

$(DOCS_READY): $(DEMO_READY)
	@echo "Installing the packages of the documentation site ..."
	$(INSTALL) --quiet -e '.[docs]'
	touch $(DOCS_READY)

$(GPU_READY): pyproject.toml
	$(PYTHON) -c 'import torch; print("PyTorch", torch.__version__, "CUDA:", torch.cuda.is_available())'
	$(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[gpu]'
	touch $(GPU_READY)
