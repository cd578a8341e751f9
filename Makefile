# Two commands do everything on a fresh machine with Python >= 3.12 and make:
#   make quickstart              install, train a small model, sample from it
#   make quickstart DATA=~/text  the same on your own text
#   make test                    linter, formatting, types and tests, in the same environment
#   make test-thorough           the same proofs on more meshes, kernels and loops
#   make test THOROUGH=1         both at once, which costs less than one after the other
#   make test-aot                everything that is compiled for TPUs (no TPU needed; an hour)
#   make test-hopper             every GPU kernel compiled for Hopper (no GPU needed)
#   make test-system             what needs packages of the system: sandbox, SLURM cluster (root)
#   make lint                    formatting and types
#   make docs                    the site, in build/site; a link that leads nowhere is an error
#   make release-check           build the wheel, install it elsewhere, train and write with it

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-thorough test-aot test-hopper test-system lint docs release-check clean

VENV := .venv
BIN := $(VENV)/bin
HOPPER := $(VENV)-hopper
# What is imported is compiled once and kept, whatever the environment says: tests and commands start
# many processes. --no-compile: most of what is installed is never imported.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := -m pip install -qq --disable-pip-version-check --no-compile
CONFIG ?= configs/quickstart.yaml
DATA ?=
ARGS ?=
# A file stays with one process, which makes its fixtures and compiles its programs once.
PYTEST_ARGS ?= -n auto --dist loadfile
THOROUGH ?=

help:
	@sed -n 's/^#   make/  make/p' Makefile

quickstart: $(VENV)/.installed
	@$(BIN)/step-jax pretrain $(CONFIG) $(if $(DATA),--data.path '$(DATA)') $(ARGS)

test: lint
	@$(BIN)/python -m pytest $(if $(THOROUGH),$(BOTH)) $(PYTEST_ARGS)

BOTH := -m 'not slow and not aot and not hopper and not system and not gpu'

test-thorough: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m 'thorough and not slow' $(PYTEST_ARGS)

test-aot: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m aot $(PYTEST_ARGS)

# In an environment of its own: with a GPU plugin installed, JAX looks for GPUs in every process.
test-hopper: $(HOPPER)/.installed
	@$(HOPPER)/bin/python -m pytest -m hopper $(PYTEST_ARGS)

test-system: $(VENV)/.installed-dev
	@$(call installed,bwrap,bubblewrap)
	@$(call installed,slurmctld,slurm-wlm munge)
	@$(BIN)/python -m pytest -m system $(PYTEST_ARGS) $$(grep -rl mark.system tests --include='test_*.py')

# If the command $(1) is not there, the system's packages $(2) are installed, by root alone.
installed = if ! command -v $(1) >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -qq -y $(2); \
	  else \
	    echo "make $@ needs $(2). On Debian and Ubuntu: apt install $(2)" >&2; exit 1; fi; fi

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.installed-dev
	@$(BIN)/python docs/make_site.py

# From the wheel that is made of the source archive, in an environment of its own, away from here.
RELEASE := build/release
release-check: $(VENV)/.created
	@rm -rf $(RELEASE) && $(BIN)/python -m venv $(RELEASE)/venv
	@$(RELEASE)/venv/bin/python $(INSTALL) build && $(RELEASE)/venv/bin/python -m build --outdir $(RELEASE)/dist .
	@$(RELEASE)/venv/bin/python $(INSTALL) $(RELEASE)/dist/*.whl && cp -r configs $(RELEASE)
	@cd $(RELEASE) && venv/bin/step-jax --help && venv/bin/step-jax --version
	@cd $(RELEASE) && venv/bin/step-jax pretrain configs/toys/pretrain.yaml --data.path venv/lib/python3*/site-packages/step_jax
	@cd $(RELEASE) && venv/bin/step-jax generate runs/toy --prompt "def " --max-new-tokens 8 && venv/bin/step-jax runs runs

# The stamps make the second call start at once; a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	@echo "Installing step-jax into $(VENV) (once; about a minute)"
	@$(BIN)/python $(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.created
	@echo "Installing step-jax and the test tools into $(VENV) (once; about a minute)"
	@$(BIN)/python $(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(HOPPER)/.installed: pyproject.toml | $(VENV)/.created
	@echo "Installing step-jax, the test tools and NVIDIA's compilers into $(HOPPER) (once)"
	@$(BIN)/python -m venv $(HOPPER)
	@$(HOPPER)/bin/python $(INSTALL) --editable '.[dev,hopper]'
	@touch $@

# `python3` may be any version, so each candidate is asked; PYTHON=/path/to/python overrides.
$(VENV)/.created:
	@for python in $(PYTHON) python3.12 python3.13 python3.14 python3 python; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    found=$$python; break; fi; done; \
	if [ -z "$${found:-}" ]; then \
	  echo "step-jax needs Python 3.12 or newer and found none. Install it, or name it:" >&2; \
	  echo "  make quickstart PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	if ! "$$found" -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$$found has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; fi; \
	"$$found" -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) $(HOPPER) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
