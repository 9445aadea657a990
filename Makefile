# The two commands: `make demo` and `make test`. Both make .venv on their own and say what they do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# not compiled by pip: of torch's files a run imports a tenth, and Python keeps what it compiles
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   install into $(VENV), train two different networks on real digits, print the table (a minute of training)"
	@echo "make test   install what the tests need, run lint, types and every test (kernels interpreted and cross-compiled)"
	@echo "make lint   ruff and mypy only"
	@echo "make clean  remove $(VENV), runs/ and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; try: make PYTHON=python3.12 ..."; exit 2; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "== installing fastffl and what it needs into $(VENV) (torch comes with CUDA: about 3 GB, once)"
	@$(BIN)/python $(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "== installing fastffl, what it needs and what the tests need into $(VENV) (torch comes with CUDA: about 3 GB, once)"
	@$(BIN)/python $(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed
	@echo "== training two different networks on 1,347 real handwritten digits, side by side (fastffl train digits)"
	@$(BIN)/fastffl train digits

lint: $(VENV)/.installed-dev
	@echo "== lint and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Triton 3.6, the oldest supported, compiles the kernels too; alone it installs in seconds, and no kernel file needs torch.
$(VENV)/triton-old/.installed: pyproject.toml | $(BIN)/python
	@echo "== installing Triton 3.6 into $(VENV)/triton-old"
	@$(PYTHON) -m venv $(VENV)/triton-old
	@$(VENV)/triton-old/bin/python $(INSTALL) 'triton==3.6.*' setuptools
	@touch $@

# Three processes: interpreted kernels can't be compiled, and only a process started with TRITON_INTERPRET=1 interprets.
# The last has three workers, for two cores: its tests often wait for what they started.
test: lint $(VENV)/triton-old/.installed
	@echo "== kernels, interpreted on the CPU against float64"
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interp -n 2 -q
	@echo "== kernels, compiled for sm_80, sm_90, sm_100 and sm_120 by the installed Triton, for sm_90 by Triton 3.6"
	@FASTFFL_TRITON_OLD=$(abspath $(VENV)/triton-old/bin/python) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/compiles -n 2 -q
	@echo "== everything else"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/compiles -n 3 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
