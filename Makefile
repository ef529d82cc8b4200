# make demo: the whole story on small data. make test: the tests.
# make ... PYTHON=python3.12 picks the interpreter, TORCH=cpu PyTorch's builds for machines without a GPU.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LOCK   := requirements.lock
# Large files over a slow line: uv would give up after 30 seconds.
export UV_HTTP_TIMEOUT ?= 300

# TORCH=cpu (or cu128, ...): PyTorch's own builds of the locked versions, without the usual CUDA libraries.
# .venv remembers it, so that the next make needs not say it again; another one makes .venv anew.
INSTALLED_TORCH := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(INSTALLED_TORCH)
TORCH_INDEX ?= https://download.pytorch.org/whl/$(TORCH)
ifneq ($(TORCH),$(INSTALLED_TORCH))
.PHONY: $(READY)
ANEW := --clear
endif
ifneq ($(TORCH),)
.DEFAULT_GOAL := install
LOCK := $(VENV)/without-torch.lock
TORCH_FIRST = sed -nE 's/^((torch|torchvision)==[^\\]*).*/\1/p' requirements.lock > $(VENV)/torch.txt && \
	awk '/^[a-z]/ {ours = !/^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/} ours' requirements.lock > $(LOCK) && \
	$$install $$compile --no-deps --index-url $(TORCH_INDEX) -r $(VENV)/torch.txt &&
endif

.PHONY: install demo test slow lint docs configs results lock clean help

help:
	@grep -E '^# make|^[a-z]+:.*##' Makefile | sed 's/:.*##/  /'

install: $(READY) ## .venv with everything; also what make TORCH=cpu alone does

demo: $(READY) ## train, test and compact a gated GoogleNet and a GPT, calibrate a survey; a table at the end
	$(BIN)/python -m sparsereg demo

test: $(READY) ## the tests, but for whole pipelines and five sixths of what is costly
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

slow: $(READY) ## the others: interrupted runs, several processes, exports, attacks, the rest of what is costly
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## the documentation as HTML, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

configs: $(READY) ## configs/*.yaml anew from the settings, after one was added or changed
	$(BIN)/python -m sparsereg.reference

results: $(READY) ## rerun the figures in docs/results.md that a CPU can
	$(BIN)/python -m benchmarks.results

lock: $(READY) ## resolve requirements.lock anew, keeping versions that still fit
	$(BIN)/python -m uv pip compile -q --universal --generate-hashes --no-annotate --no-header \
	  --python-version 3.10 requirements.txt requirements-dev.txt -o requirements.lock

# uv installs five times faster; plain pip does where uv cannot be had. Compiled bytecode saves half a
# minute at every start where Python is not allowed to write it later.
$(READY): requirements.lock pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sparsereg needs Python >= 3.10; set PYTHON=python3.X")'
	$(PYTHON) -m venv $(VENV) $(ANEW)
	echo "$(TORCH)" > $(VENV)/.torch
	if $(BIN)/python -m pip install --quiet uv; then \
	  install="$(BIN)/python -m uv pip install --python $(BIN)/python"; compile=--compile-bytecode; \
	else \
	  install="$(BIN)/python -m pip install"; \
	fi; \
	$(TORCH_FIRST) \
	$$install $$compile --no-deps -r $(LOCK) && $$install --no-deps -e .
	touch $(READY)

clean: ## remove the environment and caches; outputs/ stays
	rm -rf $(VENV) .venv-lowest build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
