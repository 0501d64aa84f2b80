# Needs Python 3.11 or later and nothing else: PYTHON= chooses which one, JAX= which version of jax (`make test
# PYTHON=python3.12 JAX=0.11.2`), or else the newest that this Python can have. Each pair has an environment of its own in
# .venv/, made at the first use and brought up to date whenever pyproject.toml or the version has changed; that of
# JAX=nightly NIGHTLY=index has each time what was built last.

PYTHON ?= python3
JAX ?=
# Where JAX=nightly is from: the index that JAX's installation guide names.
NIGHTLY ?= $(error NIGHTLY= is needed: the index of nightly builds, see JAX's installation guide)
VERSION := $(shell $(PYTHON) -c 'import sys; print("{}.{}".format(*sys.version_info))')
VENV := .venv/$(VERSION)$(JAX:%=-jax%)
RUN := $(VENV)/bin/python -m
BENCHES := networks lowerings training scenarios forms overhead noise races table remote plot

.PHONY: demo docs test fuzz lint format typecheck bench corpus notebooks clean anew
.DELETE_ON_ERROR:

demo: $(VENV)/installed-bench  ## tune real networks, and print what it gained
	$(RUN) bench.demo $(ARGS)

bench: $(VENV)/installed-bench  ## every figure of docs/results.md but PyTorch's, and a picture of each table: hours
	for name in $(BENCHES); do $(RUN) bench.$$name || exit; done

corpus: $(VENV)/installed-corpus  ## many functions, of other packages too: ratio, error, memory and compile time of each
	$(RUN) bench.corpus $(ARGS)

notebooks: $(VENV)/installed-notebooks  ## execute the notebooks, and store what they print and draw
	$(RUN) notebooks.run $(ARGS)

docs: $(VENV)/installed-docs  ## the docs site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict $(ARGS)

test: lint typecheck  ## the whole check
	$(RUN) pytest -n 2 $(ARGS)

FUZZ ?= 10
fuzz: $(VENV)/installed-test  ## drawn programs, 4 x FUZZ times as many as in the suite and others each time, and accuracy, compiled as users have it
	FUZZ=$(FUZZ) $(RUN) pytest -n 2 --timeout 7200 -o faulthandler_timeout=7260 $(addprefix tests/test_,$(addsuffix .py,fuzz retrace transformations solve lowerings relaxed_lowerings crossing primitive layout accuracy extremes)) --hypothesis-show-statistics $(ARGS)

lint: $(VENV)/installed-test  ## rules and format; `make format` mends both
	$(RUN) ruff check
	$(RUN) ruff format --check

format: $(VENV)/installed-test
	$(RUN) ruff check --fix
	$(RUN) ruff format

# pyright runs on Node.js, which its package fetches where there is none. Where that fails, the rest goes on.
typecheck: $(VENV)/installed-test
	@if $(RUN) pyright --version >/dev/null 2>&1; then \
	    echo $(RUN) pyright && $(RUN) pyright --pythonpath $(VENV)/bin/python; \
	else \
	    echo '*** pyright does not start here: TYPES ARE NOT CHECKED ***' >&2; \
	fi

$(VENV)/installed-%: pyproject.toml jaxlayout/__init__.py $(if $(filter nightly,$(JAX)),anew)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --no-compile --editable '.[$*]' $(addprefix jax==,$(filter-out nightly,$(JAX)))
	$(if $(filter nightly,$(JAX)),$(RUN) pip install --quiet --upgrade --pre jax jaxlib --index-url $(NIGHTLY))
	@touch $@

clean:
	rm -rf .venv .pytest_cache site
