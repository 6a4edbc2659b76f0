# Every target sets up what it needs: a .venv with the versions of constraints.txt.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# The newest Python >= 3.12 that runs; pyenv's shims exist for versions that are not active, so each is tried.
FIND_PYTHON := for p in python3.13 python3.12 python3.14 python3 \
	$$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[234].*/bin/python 2>/dev/null | sort -rV); do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done

.PHONY: demo test lint benchmark clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train, resume and sample from a small GPT at TP=2 x PP=2 (about 4 minutes on 2 cores)"
	@echo "make test       the test suite (under 10 minutes on 2 cores)"
	@echo "make lint       ruff and mypy"
	@echo "make benchmark  the Trainer beside a bare megatron-core loop"

$(STAMP): constraints.txt pyproject.toml setup.py
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "lightning_megatron needs Python 3.12 or newer with venv. Install it, for example: apt-get install python3.12-venv, or pyenv install 3.12"; \
		exit 1; \
	fi; \
	echo "setting up $(VENV) with $$python"; \
	"$$python" -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev,data]'
	@touch $(STAMP)

demo: $(STAMP)
	$(PYTHON) recipes/demo.py

test: $(STAMP)
	$(PYTHON) -m pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

benchmark: $(STAMP)
	$(PYTHON) benchmarks/trainer.py

clean:
	rm -rf $(VENV) build dist demo_run runs
