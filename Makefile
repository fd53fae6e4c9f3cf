# The commands of this repository. Each sets up .venv first; once that is done, this takes a fraction of a second.

.DEFAULT_GOAL := help
.PHONY: help setup demo certify test test-fast lint format typecheck image shell clean

PYTHON_IN_VENV := .venv/bin/python
PARALLEL = --numprocesses $(WORKERS) --dist loadfile
# Ranks and threads would fight for the cores: one thread per rank.
export OMP_NUM_THREADS ?= 1
# Arguments of pytest or of tools/certify.py: make test ARGS="-k noise", make certify ARGS="--layouts tp2,cp2"
ARGS ?=
# Files of tests that `make test` runs at once; each may start four ranks. 0 runs them in pytest's own process.
WORKERS ?= 2
# What `make image` is called and how it is built (docker, podman)
IMAGE ?= megatron-amopo:latest
DOCKER ?= docker
# Ranks of the demo: tp2, pp2, dp2 …
LAYOUT ?= tp2

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /|/' | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done
	@echo "Variables of set-up (PYTHON, AMOPO_TORCH_INDEX, …) are explained in tools/setup_environment/__main__.py and README.md."

# Any Python 3.9+ that really runs may make .venv: version managers put stand-ins on PATH that fail.
setup: ## make .venv with everything needed (skipped when it is there)
	@for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python /usr/bin/python3 \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python3; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1; then \
	    exec "$$python" -m tools.setup_environment; \
	  fi; \
	done; \
	echo "error: no Python 3.9 or newer runs here; install python3 with your system's package manager" >&2; exit 2

demo: setup ## align a tiny model on three dimensions, end to end, on the CPU (LAYOUT=tp2|pp2|dp2)
	@PATH="$$PWD/.venv/bin:$$PATH" LAYOUT="$(LAYOUT)" bash examples/quickstart.sh

certify: setup ## show that one result comes out under every layout: runs/certificate/certificate.md
	@$(PYTHON_IN_VENV) tools/certify.py $(ARGS)

test: setup ## run the whole test suite
	@$(PYTHON_IN_VENV) -m pytest $(PARALLEL) --durations=15 $(ARGS)

test-fast: setup ## run the tests that are not marked slow
	@$(PYTHON_IN_VENV) -m pytest $(PARALLEL) --durations=15 -m "not slow" $(ARGS)

lint: setup ## ruff: rules and format; shellcheck and hadolint
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@PATH="$$PWD/.venv/bin:$$PATH" shellcheck -x .ci/run examples/*.sh examples/cluster/*.sh examples/slurm/*.sbatch
	@PATH="$$PWD/.venv/bin:$$PATH" hadolint Dockerfile

format: setup ## ruff: mend what can be mended, and format
	@$(PYTHON_IN_VENV) -m ruff check --fix .
	@$(PYTHON_IN_VENV) -m ruff format .

typecheck: setup ## mypy
	@$(PYTHON_IN_VENV) -m mypy

image: ## build the container (docs/container.md); IMAGE= names it
	$(DOCKER) build --build-arg REVISION="$$(git describe --always --dirty)" --tag "$(IMAGE)" .

# The host's user owns what is written to runs/; shared memory and pinned memory are what NCCL wants.
shell: ## a shell in the container, with the GPUs and ./runs
	@mkdir -p runs
	$(DOCKER) run --rm -it --gpus all --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
	  --user "$$(id -u):$$(id -g)" --env HOME=/tmp --volume "$$PWD/runs:/opt/megatron-amopo/runs" "$(IMAGE)"

clean: ## remove .venv, runs and caches
	rm -rf .venv .venv-tools runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
