# make demo: from nothing to a table.   make test: what CI runs.   make gpu: what only a GPU can show.
PYTHON ?= python3
VENV ?= .venv
# The build for CPUs; on a CUDA machine: make setup TORCH=torch==2.13.0
TORCH ?= torch==2.13.0+cpu
RUN = $(VENV)/bin/python
# Torch for CUDA: that of the environment, where there is one
GPU_PYTHON ?= $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))

# Modules are compiled when they are first imported: compiling all of what pip installs takes as long as installing it
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo test gpu lint format bench-scheduler

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Zipage needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -q --no-compile --disable-pip-version-check "$(TORCH)" || { \
	  echo "No $(TORCH) for this Python in pip's indexes: taking the default build of torch, which on Linux may bring"; \
	  echo "gigabytes of CUDA. To avoid that, stop here and point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU wheels."; \
	  $(RUN) -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0; }
	$(RUN) -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

demo: setup
	@$(RUN) -m experiments.run +sweep=demo +share_model=true hardware=cpu
	@$(RUN) -m experiments.report results/runs/sweeps/demo-*.json --html results/runs/demo.html --title "Zipage demo" > /dev/null
	@echo "page: results/runs/demo.html"

# Each worker gets tests that follow each other, which share what a module's fixtures have made; there is one more than
# there are cores, since some tests wait
WORKERS ?= $(shell expr $$(nproc) + 1 2> /dev/null || echo auto)

test: setup lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal

# GPU_ARGS: --full, --commit COMMIT where this is no git checkout
gpu:
	$(GPU_PYTHON) -m tests.gpu $(GPU_ARGS)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench-scheduler: setup
	$(RUN) -m pytest tests/benchmarks/bench_scheduler.py -q -p no:cacheprovider
