# Every target works on a bare Python 3.11+ with pip: the environment is made when it is missing.
PYTHON ?= python3
BIN = .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: all test test-slow lint bench study figures soundness models bench-models clean
all: lint test

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

test: .venv/.installed  ## the tests CI runs
	$(BIN)/python -m pytest -n auto

test-slow: .venv/.installed  ## the long ones
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed  ## style, types, one-way imports
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/.installed  ## figures of docs/performance.md
	for script in $(filter-out benchmarks/study.py,$(wildcard benchmarks/[!_]*.py)); do $(BIN)/python $$script || exit 1; done

study: .venv/.installed  ## reports/study: hours on one core; goes on where it stopped
	$(BIN)/python benchmarks/study.py

figures: .venv/.installed  ## put the figures of reports/ into README.md and docs/ (tests check that they agree)
	$(BIN)/python docs/figures.py --write

soundness: .venv/.installed  ## 20,000 random networks against exact rational evaluation
	$(BIN)/python tests/soundness/hunt.py --networks 20000 --jobs 2

models: .venv/.installed  ## train models/ again
	$(BIN)/python models/train.py

bench-models: .venv/.installed  ## networks that only benchmarks need, too large to commit
	$(BIN)/python models/train.py --bench

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
