# `make quickstart`, `make quickstart-pixels`, `make test`, `make quality`, `make docs`, `make release-check`: each makes .venv if need be, and can be repeated.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What pip installs first. Any other build: make quickstart TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# What .venv was made with is kept until another is asked for.
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),$(shell grep '^torch==' constraints.txt))
CORES := $(shell nproc)
OUTPUT = outputs/$@$(if $(FRESH),-$(shell date +%Y%m%d-%H%M%S))
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)
SOURCES := src tests examples benchmarks setup.py

.PHONY: quickstart quickstart-pixels test style quality docs release-check FORCE

quickstart: $(VENV)/.installed
	$(LAUNCH) examples/text_to_image/train_disback.py --output_dir $(OUTPUT) --resume_from_checkpoint latest

quickstart-pixels: $(VENV)/.installed
	$(LAUNCH) examples/unconditional_image_generation/train_disback.py --output_dir $(OUTPUT) --resume_from_checkpoint latest

# More arguments of pytest: make test ARGS="-m slow"
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile $(ARGS)

# The site of docs/, in site/. `make test` builds it elsewhere: a warning fails there, too.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

style: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# Builds wheel and sdist, checks them, and uses the wheel in an environment of its own, into which it downloads all it needs.
release-check: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow and network" tests/test_release.py

$(VENV)/.installed: setup.py pyproject.toml constraints.txt $(VENV)/.torch
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

# Changes when TORCH does.
$(VENV)/.torch: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
