# The environment is .venv; every target creates it when it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0
export RAY_AUTH_MODE := disabled
export HF_HUB_OFFLINE := 1

.PHONY: demo test check test-ray bench format clean help

help: ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	@echo "== creating $(VENV) and installing (about 1 minute with packages cached)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip 2>&1 | grep -v "is ignored" || true
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable ".[dev]" \
		> $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; } # setuptools warns of what is meant so
	@touch $(STAMP)

demo: $(STAMP) ## serve the demo model from a local cluster's memory tiers and print the report
	@$(BIN)/python -m hotset demo

check: $(STAMP) ## format, lint, types and pure tests: under 2 minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not ray and not nixl and not slow and not browser"

test: check ## everything: pure tests, then transport between processes, a browser, Ray
	$(BIN)/python -m pytest -q -m "nixl and not ray"
	$(BIN)/python -m pytest -q -m "slow and not nixl and not ray and not browser"
	$(BIN)/python -m pytest -q -m "browser and not ray"
	$(BIN)/python -m pytest -q -m "ray"

bench: $(STAMP) ## tokens/s against transformers in full memory and under a memory limit
	@$(BIN)/python -m hotset bench serve

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
