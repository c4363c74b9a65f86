# `make demo` and `make test` are all that a fresh machine needs: each first makes .venv, with the versions of
# constraints.txt. Wanted: make, and Python 3.11 or newer with venv.

PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
DEVICE ?= cpu
DEMO := out/demo
BIN := .venv/bin
VLMC := $(BIN)/vlmc
INSTALLED := .venv/.installed

# Nothing is fetched once .venv is there.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test lint lock clean
.DEFAULT_GOAL := help

help: ## List these targets.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(INSTALLED) ## Export, calibrate, build, ask and measure the bundled model (DEVICE=rpi5 on a Raspberry Pi 5).
	$(VLMC) export demo -o $(DEMO)
	$(VLMC) build $(DEMO) --device $(DEVICE) --int8
	$(VLMC) run $(DEMO) $(DEMO)/golden/00.png --prompt "Describe the picture briefly."
	$(VLMC) profile $(DEMO) --device $(DEVICE) --runs 12 --samples 16
	@echo "The page: $(CURDIR)/$(DEMO)/profile/$(DEVICE)/report.html"

test: lint ## Everything that has to hold: linters, types, import order, tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(INSTALLED) ## The linters alone.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

lock: $(INSTALLED) ## Write the installed versions to constraints.txt.
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean: ## Remove .venv, what was built, and the demo's artefact.
	rm -rf .venv build dist *.egg-info $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The wheel of torch that pip takes is pip's own configuration's choice; see README.md, "Quick start".
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is not there. Debian: apt install python3 python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation \
		--editable '.[export,openvino,report,rtx,dev]'
	touch $@
