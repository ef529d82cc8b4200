# make demo: the whole story on small data. make test: the tests. PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint docs results clean help

help:
	@grep -E '^# make|^[a-z]+:.*##' Makefile | sed 's/:.*##/  /'

demo: $(READY) ## train, test and compact a gated GoogleNet, calibrate a survey; a table at the end
	$(BIN)/python -m sparsereg.demo

test: $(READY) ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY) ## the documentation as HTML, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

results: $(READY) ## rerun the figures in docs/results.md that a CPU can
	$(BIN)/python -m benchmarks.results

# uv installs five times faster; plain pip does where uv cannot be had. Compiled bytecode saves half a
# minute at every start where Python is not allowed to write it later.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparsereg needs Python >= 3.10; set PYTHON=python3.X")'
	$(PYTHON) -m venv $(VENV)
	if $(BIN)/python -m pip install --quiet uv; then \
	  $(BIN)/python -m uv pip install --python $(BIN)/python --compile-bytecode -r requirements.lock && \
	  $(BIN)/python -m uv pip install --python $(BIN)/python --no-deps -e .; \
	else \
	  $(BIN)/python -m pip install -r requirements.lock && $(BIN)/python -m pip install --no-deps -e .; \
	fi
	touch $(READY)

clean: ## remove the environment and caches; outputs/ stays
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
