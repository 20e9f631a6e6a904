# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
LATEST_VENV ?= .venv-latest
DOCS_VENV ?= .venv-docs
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
PYTEST_ARGS ?=

# Compiling all packages to bytecode would take as long as the rest of an installation; what is imported is
# compiled once, on import, whatever the caller's environment says.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS)
unexport PYTHONDONTWRITEBYTECODE
DEPENDENCIES := pyproject.toml $(CONSTRAINTS)
# One thread a worker: the test processes share the cores. A file stays with one worker, so that what its fixtures
# compile, and the ranks that they start, are there once.
PYTEST := OMP_NUM_THREADS=1 FX_APPROX_TEST_INSTALLED=1 $(TEST_VENV)/bin/pytest --numprocesses $(JOBS) --dist loadfile
# The fast half: what rests on torch's internals. Left out is what rests on the rest of the package.
LATEST_FAST := $(foreach name,sampling policies benchmarks examples,--ignore=tests/$(name)) \
  $(foreach name,analysis/test_noise* compiler/test_reference_defects distributed/test_slices \
    repository/test_repository schedules/test_controller schedules/test_growth,'--ignore-glob=tests/$(name).py')
# multinode.py needs root and an hour, gpu.py a GPU, regression.py another commit; pages.py measures nothing.
BENCHMARKS := $(filter-out $(foreach name,multinode pages gpu regression,benchmarks/$(name).py), $(wildcard benchmarks/[!_]*.py))

.DELETE_ON_ERROR:
.PHONY: help dev demo docs bench bench-quick test test-latest test-latest-fast slow lint clean fresh-test-env wheel

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# ---- the working environment: editable, kept until the dependencies change

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(DEPENDENCIES) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(DEPENDENCIES) | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[dev]'
	touch $@

dev: $(VENV)/.dev ## make or renew the working environment, an editable install with all tools

demo: $(VENV)/.demo ## run the demo
	$(VENV)/bin/python -m fx_approx demo

bench: $(VENV)/.dev ## run every benchmark, one after the other
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(VENV)/bin/python $$script; done

BASE ?= HEAD~1

bench-quick: $(VENV)/.dev ## whether steps have become slower since the commit BASE (HEAD~1), in ten minutes
	$(VENV)/bin/python benchmarks/regression.py --base $(BASE)

# ---- the site of the documentation; it reads the sources, so neither the package nor torch is installed

$(DOCS_VENV)/.docs: $(DEPENDENCIES)
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	  | xargs $(DOCS_VENV)/bin/python $(PIP_INSTALL)
	touch $@

docs: $(DOCS_VENV)/.docs ## build the site of the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# ---- the test environment: the built wheel, never the source tree

# The wheel is built from the source distribution, so a file missing from either shows.
wheel: $(TEST_VENV)/.tools
	rm -rf $(TEST_VENV)/dist
	$(TEST_VENV)/bin/python -m build --no-isolation --outdir $(TEST_VENV)/dist . > $(TEST_VENV)/build.log 2>&1 \
	  || { cat $(TEST_VENV)/build.log; exit 1; }

$(TEST_VENV)/.tools: $(DEPENDENCIES)
	$(PYTHON) -m venv --clear $(TEST_VENV)
	$(TEST_VENV)/bin/python $(PIP_INSTALL) build setuptools
	touch $@

fresh-test-env:
	rm -rf $(TEST_VENV)
	$(MAKE) --no-print-directory wheel
	$(TEST_VENV)/bin/python $(PIP_INSTALL) "$$(echo $(TEST_VENV)/dist/*.whl)[test]"
	@# Workers that start at the same time would each compile all that they import of these. One file of torch is written
	@# for a later Python, which makes the exit status 1.
	$(TEST_VENV)/bin/python -m compileall -qq -j $(JOBS) $(TEST_VENV)/lib/python3*/site-packages/torch \
	  $(TEST_VENV)/lib/python3*/site-packages/sympy || true

test: fresh-test-env ## build the wheel, install it in a new environment, run the tests
	$(PYTEST) $(PYTEST_ARGS)

slow: fresh-test-env ## the same for the tests that take minutes
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: wheel ## ruff, mypy and the import contracts on the installed wheel, what PyPI would refuse, length of the files
	$(TEST_VENV)/bin/python $(PIP_INSTALL) "$$(echo $(TEST_VENV)/dist/*.whl)[dev]"
	$(TEST_VENV)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps $(TEST_VENV)/dist/*.whl
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	cd $(TEST_VENV) && bin/mypy --strict --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p fx_approx
	$(TEST_VENV)/bin/twine check --strict $(TEST_VENV)/dist/*
	cd $(TEST_VENV) && bin/lint-imports "$(CURDIR)/pyproject.toml" --no-cache
	@git ls-files --cached --others --exclude-standard '*.py' | xargs wc -l \
	  | awk '$$2 != "total" && $$1 > 600 { print $$2 ": " $$1 " lines, more than 600"; bad = 1 } END { exit bad }'

# ---- the newest torch that is supported, in an environment of its own (5.5 GB)

build/constraints-latest.txt: constraints-latest.txt constraints.txt
	mkdir -p build
	awk -F== 'NR == FNR { latest[$$1]; print; next } !($$1 in latest)' $^ > $@

test-latest: build/constraints-latest.txt ## `make test` on the newest torch
	$(MAKE) --no-print-directory test TEST_VENV=$(LATEST_VENV) CONSTRAINTS=$<

test-latest-fast: build/constraints-latest.txt ## the half of it that rests on torch's internals
	$(MAKE) --no-print-directory test TEST_VENV=$(LATEST_VENV) CONSTRAINTS=$< PYTEST_ARGS="$(LATEST_FAST) $(PYTEST_ARGS)"

clean: ## remove environments, caches and builds
	rm -rf $(VENV) $(TEST_VENV) $(LATEST_VENV) $(DOCS_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
