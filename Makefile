# `make quickstart` trains and tries an adapter; `make test` checks the code, `make test-all` its long tests as well.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all test-oldest test-latest lock gpu-dry lint types unit unit-all release bench clean

quickstart: .venv/base.stamp
	$(BIN)/loratune quickstart --overwrite

test: lint types unit

test-all: lint types unit-all

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/mypy

# Tests are shared out among processes of one thread each, and whoever is done takes from the others. A test that takes
# more than 5 minutes fails, a run of more than 25 ends, and what failed is named last, see scripts/run_tests.py.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python scripts/run_tests.py --numprocesses logical --maxprocesses 4 \
	--dist worksteal --durations 20

unit: .venv/dev.stamp
	$(PYTEST) -m "not slow"

unit-all: .venv/dev.stamp
	$(PYTEST) --limit 1200 --whole 7200

# The oldest versions that pyproject.toml allows: is everything undocumented that we use there, and does a run do what it
# did? A module that cannot be imported does not hide the others' failures.
BOUNDS = tests/test_upstream_*.py tests/test_sweep.py tests/test_train.py
test-oldest: BIN := .venv-oldest/bin
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --resolution lowest-direct --editable '.[dev]'
	$(PYTEST) -m "not slow" --continue-on-collection-errors $(BOUNDS)

# Today's newest versions, as a user gets them, but where pip itself is told otherwise (PIP_CONSTRAINT, PIP_FIND_LINKS). What
# fails is named with the package that breaks it, see scripts/newest_versions.py.
test-latest: BIN := .venv-latest/bin
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python scripts/newest_versions.py env $(PYTEST) -m "not slow" --continue-on-collection-errors

# The sdist and both wheels of the last commit, see scripts/build_release.py. The bytes depend on the commit, the gcc, and
# scripts/release.txt.
DIST := dist
release:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check --requirement scripts/release.txt
	.venv-release/bin/python scripts/build_release.py "$(DIST)"

# What a GPU would run, without one: torch for CUDA takes 6 GB, and pip must not take a build for CPUs that lies here.
GPU_DRY ?= $(HOME)/.cache/loratune-gpu-dry
gpu-dry: $(GPU_DRY)/installed
	PYTHONPATH=. $(GPU_DRY)/bin/python scripts/gpu_dry.py

$(GPU_DRY)/installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_DRY)
	PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= $(GPU_DRY)/bin/python -m pip install --quiet --editable . liger-kernel
	$(GPU_DRY)/bin/python -c "import torch; assert torch.version.cuda, torch.__version__"
	touch $@

# Hours, on a machine that does nothing else; BENCH="--sets natural --rounds 1" makes it less.
bench: .venv/base.stamp
	$(BIN)/python scripts/bench.py $(BENCH)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/base.stamp: EXTRAS :=
.venv/dev.stamp: EXTRAS := [dev]
# setuptools builds, and is of the lock as well: pip would take the newest one for an environment of its own.
.venv/%.stamp: pyproject.toml scripts/lock.txt .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint scripts/lock.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint scripts/lock.txt --no-build-isolation \
		--editable '.$(EXTRAS)'
	touch $@

# The newest versions that fit together, but for those held back, and the packages that builds of torch pin themselves.
HELD = torch==2.13.0 transformers==5.25.0
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	printf '%s\n' $(HELD) setuptools | .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 \
		--fork-strategy fewest --extra dev --no-annotate --no-header --output-file .venv-lock/versions.txt pyproject.toml -
	{ grep '^#' scripts/lock.txt; sed -E '/^(loratune|nvidia-.*|cuda-.*|triton)\b/d; s/\+[^ ]*//' .venv-lock/versions.txt; } \
		> .venv-lock/lock.txt
	mv .venv-lock/lock.txt scripts/lock.txt

clean:
	rm -rf .venv .venv-oldest .venv-latest .venv-lock .venv-release dist quickstart .mypy_cache .ruff_cache .pytest_cache
