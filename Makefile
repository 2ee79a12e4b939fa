# Needs Python 3.10 or newer, a C++ compiler and make; `make help` lists the targets.
#   make PYTHON=python3.12 ...      another interpreter for .venv (only looked at when .venv is made)
#   make TORCH_FLAGS="..." env      further pip options for installing torch, such as an index of CPU builds
#   make test ARGS="-k codec -x"    ARGS goes to the program that a target runs

PYTHON ?= python3
TORCH_FLAGS ?=
ARGS ?=
DATA ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
FASHION := .cache/fashion-mnist
FASHION_FILES := train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz \
	t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz

# Compiling the CPU kernels takes a while, so all programs started from here share a cache of them.
NUMBA_CACHE_DIR ?= $(CURDIR)/.cache/numba
export NUMBA_CACHE_DIR

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env horovod demo lint types docs test quick reproduce table1 mixing lm bench soak fuzz clean

help:
	@echo 'make env        .venv with the exact versions of constraints.txt and saef installed in it'
	@echo 'make horovod    Horovod for .venv, built once in some minutes (make test does it too)'
	@echo 'make demo       examples/demo.py'
	@echo 'make lint       ruff: rules and format; the direction of imports'
	@echo 'make types      mypy --strict on the installed package'
	@echo 'make docs       docs/ and the API reference as a site in .cache/site; a warning is an error'
	@echo 'make test       the whole test suite'
	@echo 'make quick      the tests that need no Horovod, DeepSpeed or launcher, without the slow ones'
	@echo 'make reproduce  examples/reproduce.py on Fashion-MNIST; DATA=folder if you have it already'
	@echo 'make table1     examples/table1.py: the SAEF paper'\''s Table 1, for one GPU and some minutes; DATA=folder'
	@echo 'make mixing     examples/mixing.py: mixing times, and training under weak consistency, drawn'
	@echo 'make lm         examples/lm.py: a language model by AdamW, in six ways, 4 ranks: about ten minutes'
	@echo 'make bench      the benchmarks behind the figures in docs/performance.md'
	@echo 'make soak       10,000 steps with NaNs and killed ranks, for two methods: about 15 minutes'
	@echo 'make fuzz       hostile bytes for the decoders, every access checked, then coverage-guided'
	@echo 'make clean      removes .venv, .cache (with the data fetched) and build outputs'

# ---- the environment ----------------------------------------------------------------------------------------

env: $(VENV)/.saef

# torch goes first and pinned: left to the resolver, a newer build with gigabytes of CUDA libraries may win.
$(VENV)/.deps: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "saef needs Python 3.10 or newer, and '$(PYTHON)' is older or missing." >&2; \
	echo "Name another one: make PYTHON=python3.12 env" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "'$(PYTHON)' cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
	echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt $(TORCH_FLAGS) torch
	$(PIP) install -c constraints.txt setuptools wheel
	rm -rf build *.egg-info
	$(PIP) install -c constraints.txt --no-build-isolation '.[demo,test,lint]'
	rm -rf build *.egg-info
	touch $@

# A plain install, not an editable one: everything runs against the package as a user has it, and mypy cannot
# follow an editable install of renamed folders. build/ is removed before, or modules deleted since the last
# build stay in the wheel, and after, since *.egg-info in the checkout would be found as the installed version.
SOURCES := $(shell find core hooks integrations -name __pycache__ -prune -o \
	\( -type d -o -name '*.py' -o -name py.typed \) -print)

$(VENV)/.saef: $(VENV)/.deps pyproject.toml $(SOURCES)
	rm -rf build *.egg-info
	$(PIP) install -q --no-deps --no-build-isolation --force-reinstall .
	rm -rf build *.egg-info
	$(PY) -m saef.wire.kernels
	touch $@

horovod: $(VENV)/.horovod

# Without this make's own flags, which the make inside would obey.
$(VENV)/.horovod: $(VENV)/.deps integrations/build_horovod.sh
	MAKEFLAGS= integrations/build_horovod.sh $(PY) -c constraints.txt
	touch $@

# ---- checks -------------------------------------------------------------------------------------------------

lint: env
	$(PY) -m ruff check . $(ARGS)
	$(PY) -m ruff format --check .
	$(PY) .ci/arrows.py

types: env
	$(PY) -m mypy --strict -p saef $(ARGS)

# The API reference is read from the package as it is installed. MkDocs itself fetches nothing, and nor do the pages.
docs: env $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

$(VENV)/.docs: $(VENV)/.deps
	rm -rf build *.egg-info
	$(PIP) install -c constraints.txt --no-build-isolation '.[docs]'
	rm -rf build *.egg-info
	touch $@

# In three processes (-n), since jobs of frameworks wait; ranks alone keep two cores at work with two. ARGS="-n 0 FILE"
# runs a file in one.
test: env horovod
	$(PY) -m pytest -n 3 $(ARGS)

quick: env
	$(PY) -m pytest -n 2 -m 'not slow' tests/pure tests/workers tests/ranks $(ARGS)

# ---- programs -----------------------------------------------------------------------------------------------

demo: env
	$(PY) examples/demo.py $(ARGS)

ifeq ($(DATA),)
reproduce table1: $(FASHION)/.complete
endif
reproduce: env
	$(PY) examples/reproduce.py --data "$(or $(DATA),$(FASHION))" $(ARGS)

table1: env
	$(PY) examples/table1.py --data "$(or $(DATA),$(FASHION))" $(ARGS)

# Debian and Ubuntu have the data as a package; unpacking it needs no root.
$(FASHION)/.complete:
	@mkdir -p $(FASHION)
	@test -n "$(wildcard $(FASHION)/train-images*)" || { \
	rm -rf .cache/deb && mkdir -p .cache/deb && cd .cache/deb && \
	apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb . && \
	mv usr/share/datasets/fashion-mnist/*.gz ../../$(FASHION)/ && cd .. && rm -rf deb; } || true
	@for f in $(FASHION_FILES); do test -s $(FASHION)/$$f || { \
	echo "Fashion-MNIST could not be fetched as Debian's package dataset-fashion-mnist (apt-get download)." >&2; \
	echo "Put its four files into $(FASHION), or name their folder with DATA=folder:" >&2; \
	for g in $(FASHION_FILES); do echo "    $$g" >&2; done; exit 1; }; done
	@touch $@

mixing: env
	OMP_NUM_THREADS=1 $(PY) examples/mixing.py $(ARGS)

lm: env
	$(PY) examples/lm.py $(ARGS)

bench: env
	$(PY) benchmarks/kernels.py $(ARGS)
	$(PY) benchmarks/step.py --trace .cache/step-trace.json $(ARGS)
	$(PY) benchmarks/averaging.py
	$(PY) benchmarks/start.py
	$(PY) benchmarks/scaling.py --model-only

soak: env
	$(PY) tests/support/soak.py $(ARGS)

fuzz: env
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(NUMBA_CACHE_DIR)-checked $(PY) tests/support/fuzz.py $(ARGS)
	NUMBA_DISABLE_JIT=1 $(PY) tests/support/fuzz.py --atheris --messages 100000

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .hypothesis .ruff_cache .mypy_cache .pytest_cache
	find core hooks integrations tests examples benchmarks -name __pycache__ -exec rm -rf {} + 2>/dev/null || true
