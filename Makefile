# Wherry: everything a checkout needs. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
VENV ?= .venv
# where `make dist` puts wheels, and the copy that it builds them from
DIST ?= dist
RELEASE ?= build/release
# tests at a time: one more than cores, since whole processes are often waited for
JOBS ?= 3
BIN := $(VENV)/bin
MEMBERS := shared optimizer server agent simulators
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' shared/pyproject.toml)
TAG := $(shell $(PYTHON) -c 'import sys; print("3.11" if sys.version_info[:2] == (3, 11) else "3.12")' 2>/dev/null)
ifeq ($(TAG),)
$(error no Python found ($(or $(PYTHON),python3.11)), so nothing can be installed; install Python 3.11, or say make PYTHON=/path/to/python3.12)
endif
STAMP := $(VENV)/.installed-$(TAG)

.PHONY: help setup demo test slow soak lint audit format types imports bench dist clean mutants

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /\1\t/' | column -t -s "$$(printf '\t')"

setup: $(STAMP)  ## create .venv and install everything (pinned, hashed)

$(STAMP): requirements/python-$(TAG).txt $(MEMBERS:%=%/pyproject.toml)
	@echo "== Wherry: creating $(VENV) and installing about 900 MB of pinned packages (one to five minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/python-$(TAG).txt
	@echo "== installing the five members of the workspace"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(MEMBERS:%=-e %)
	@$(BIN)/python -m compileall -q $(MEMBERS:%=%/src)  # as installing a wheel does: a process that compiles takes MBs more
	@touch $(STAMP)

demo: setup  ## one real model from the optimizer to a fleet and back (KEEP=1 leaves it running)
	$(BIN)/wherry-sim demo $(if $(filter-out 0 no false,$(KEEP)),--keep)

test: setup  ## unit, scenario, property, simulator and end-to-end tests
	$(BIN)/python -m pytest -m "not soak and not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

slow: setup  ## whole sites with faults and waits: killed, cut off, lied to, out of room
	$(BIN)/python -m pytest -m "slow and not soak" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup  ## the long forms of the suites
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r requirements/soak.txt \
		|| echo "== atheris does not install here: parsers are fuzzed without its guidance"
	$(BIN)/python -m pytest -m soak --timeout 3600 $(ARGS)

mutants: setup  ## put deliberate bugs into the machine and the rollout engine, and require each to be caught
	$(BIN)/wherry-sim mutants $(ARGS)
	$(BIN)/python -m pytest -q --timeout 900 tests/server/test_rollout_mutants.py

lint: setup  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: setup  ## locked packages: pinned, hashed, nothing beside them, licences, bill of materials; pip-audit where a database is in reach
	@test -x build/audit/venv/bin/pip-audit || { $(PYTHON) -m venv build/audit/venv && build/audit/venv/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-deps --require-hashes -r requirements/audit.txt; } || echo "== pip-audit does not install here"
	$(BIN)/python requirements/audit.py --pip-audit build/audit/venv/bin/pip-audit $(ARGS)

format: setup  ## format and sort
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## make bench NAME=x runs benchmarks/x.py and writes build/bench/x.json
	@test -n "$(NAME)" || { echo "say make bench NAME=x; there are:"; ls benchmarks/*.py; exit 2; }
	$(BIN)/python benchmarks/$(NAME).py

dist: setup  ## wheels that name their siblings by version, built from a copy of what git tracks
	rm -rf $(RELEASE) $(DIST) && mkdir -p $(RELEASE)
	git ls-files $(MEMBERS) pyproject.toml | xargs cp --parents -t $(RELEASE)
	sed -i -E 's# @ \{root:parent:uri\}/[a-z]+#==$(VERSION)#g' $(RELEASE)/*/pyproject.toml
	for member in $(MEMBERS); do $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(DIST) $(RELEASE)/$$member || exit 1; done
	$(BIN)/python -c 'import sys, zipfile; wheels = [zipfile.ZipFile(name) for name in sys.argv[1:]]; sys.exit(any(" @ " in line for wheel in wheels for name in wheel.namelist() if name.endswith("dist-info/METADATA") for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist:")))' $(DIST)/*.whl

clean:  ## remove what was built, keep the environment
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
