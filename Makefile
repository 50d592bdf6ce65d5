# `make demo` and `make test` do everything on a fresh machine; each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test quick lint clean

demo: $(READY)  ## the main job on the embedded digits: train, convert, distil to W2A4, export, report
	$(BIN)/python train.py experiment=demo

test: $(READY)  ## all tests, a file at a time on each of two cores, the slowest first
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: $(READY)  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chip-%: $(READY)  ## the environment of a vendor's tool, for archnet compile: make chip-rknn
	$(BIN)/python -m archnet compile --install $*

clean:  ## caches, not runs and not .venv
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

# An interrupted installation leaves no stamp and is done again.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@
