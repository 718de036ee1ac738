# Every target works in a fresh clone with nothing but make and Python 3.11 or newer: it sets up .venv first, when that is missing or older than pyproject.toml.
# Another interpreter: make PYTHON=python3.12 demo. More arguments: make test ARGS="tests/pools -x", make demo ARGS=--help.

VENV := .venv
BIN := $(VENV)/bin
ARGS :=
PEERS := .venv-peers
FLOWER := .venv-flower
PEER_PACKAGES := mergekit==0.1.5 fusion-bench==0.2.33
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do "$$p" -c '$(RECENT)' 2>/dev/null && { echo "$$p"; break; }; done)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test parity flower lint types bench clean

help:
	@echo "make demo    merge the models of the embedded zoo with every method and print one table"
	@echo "make test    run the whole test suite"
	@echo "make parity  the same merges by mergekit and fusion_bench, equal to rounding (they go into $(PEERS), 2 GB)"
	@echo "make flower  the tests that need Flower, and a small simulation (it goes into $(FLOWER), 6 GB)"
	@echo "make lint    ruff: rules and formatting"
	@echo "make types   mypy on the installed subpackages"
	@echo "make bench   speed and memory of the operators and of a solve, as ratios"
	@echo "make clean   remove .venv, build outputs and caches (runs/ stays)"

demo: $(VENV)/.demo
	@$(BIN)/mergesolve demo $(ARGS)

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(ARGS)

parity: $(PEERS)/.parity
	@$(PEERS)/bin/python -m pytest tests/parity $(ARGS)

flower: $(FLOWER)/.flower
	@$(FLOWER)/bin/python -m pytest tests/federated/flower $(ARGS)
	@PATH="$(abspath $(FLOWER))/bin:$$PATH" bash docs/examples/flower/simulation.sh

lint: $(VENV)/.lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy does not follow the finder of an ordinary editable install, and has to see what users get: a regular install of its own, made anew each time.
# build/lib goes first, because setuptools would ship modules from it that were deleted since.
types: $(VENV)/.lint
	@rm -rf build/lib build/types
	@$(INSTALL) --no-deps --target build/types .
	@MYPYPATH=build/types $(BIN)/mypy $$(ls build/types/mergesolve | sed 's/^/-p mergesolve./') > build/types.log; status=$$?; \
	  sed 's|^build/types/mergesolve/||' build/types.log; exit $$status

bench: $(VENV)/.demo
	@$(BIN)/python benchmarks $(ARGS)

clean:
	rm -rf $(VENV) $(PEERS) $(FLOWER) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(RECENT)' 2>/dev/null || { \
	  echo "mergesolve needs Python 3.11 or newer; found $$("$(or $(PYTHON),python3)" --version 2>&1). Name one with: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The peers pin other versions of our dependencies than we do, so they have an environment of their own. PyTorch comes first, or they would choose the release.
# Our own package comes without its dependencies: merging needs none that the peers do not bring or this line does not name, and open_clip would want another torchvision.
$(PEERS)/.parity: pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(RECENT)' 2>/dev/null || { echo "mergesolve needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12 parity" >&2; exit 1; }
	@echo "Installing mergekit and fusion_bench into $(PEERS): two to five minutes."
	@test -x $(PEERS)/bin/python || "$(PYTHON)" -m venv $(PEERS) || { rm -rf $(PEERS); exit 1; }
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PEER_PACKAGES) pytest click numpy scipy pyyaml safetensors rich
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Flower pins other versions of what we use than we do, too.
$(FLOWER)/.flower: pyproject.toml
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(RECENT)' 2>/dev/null || { echo "mergesolve needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12 flower" >&2; exit 1; }
	@echo "Installing mergesolve with Flower and Ray into $(FLOWER): two to five minutes."
	@test -x $(FLOWER)/bin/python || "$(PYTHON)" -m venv $(FLOWER) || { rm -rf $(FLOWER); exit 1; }
	@$(FLOWER)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[flower,test]'
	@touch $@

# One stamp for each set of dependencies. The test set holds the demo's, so a fresh clone that starts with `make test` installs once.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing mergesolve into $(VENV): one to five minutes, most of it PyTorch (about 5.5 GB on disk with its CUDA libraries)."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing mergesolve and the test tools into $(VENV): one to five minutes, most of it PyTorch (about 5.5 GB on disk with its CUDA libraries)."
	@$(INSTALL) -e '.[test]'
	@touch $(VENV)/.demo $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.demo
	@echo "Installing ruff, mypy and pre-commit into $(VENV): under a minute."
	@$(INSTALL) -e '.[lint]'
	@touch $@
