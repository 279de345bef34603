# Needs only Python >= 3.11 and make. Every target makes the virtual environment that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

NODE := tests/thirdparty/node

# Images of CI set it. Every process of the tests would then compile the project anew, for half of what its start takes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: up test check clients bench bench-abuse bench-analytics bench-timing clean lock
.DELETE_ON_ERROR:

up: $(VENV)/.runtime        ## sets everything up and runs the service; Ctrl-C stops it
	@exec $(BIN)/token-ledger up

test: $(VENV)/.dev          ## runs every test
	$(BIN)/python -m pytest $(ARGS)

clients: $(NODE)/node_modules/.package-lock.json  ## what Node runs in the tests of other people's clients; needs npm

check: $(VENV)/.dev         ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev         ## prints the benchmark table; needs wrk
	$(BIN)/python -m tests.bench $(ARGS)

bench-analytics: $(VENV)/.dev  ## prints the analytics store's table; 50 million uses unless ARGS="--uses N"
	$(BIN)/python -m tests.bench.analytics $(ARGS)

bench-abuse: $(VENV)/.dev   ## makes a history with known attacks and prints what the abuse rules find in it
	$(BIN)/python -m tests.bench.abuse $(ARGS)

bench-timing: $(VENV)/.dev  ## prints whether the time of a refusal tells why it was refused
	$(BIN)/python -m tests.bench.timing $(ARGS)

lock:                       ## renews the lock files; needs uv
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet \
		--no-emit-index-url --no-emit-find-links --upgrade --extra server --extra client \
		pyproject.toml -o requirements.lock
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet \
		--no-emit-index-url --no-emit-find-links --constraint requirements.lock --upgrade \
		pyproject.toml --extra server --extra client --group dev --group build -o requirements-dev.lock

clean:
	rm -rf $(VENV) $(NODE)/node_modules

$(NODE)/node_modules/.package-lock.json: $(NODE)/package.json $(NODE)/package-lock.json
	npm ci --prefix $(NODE) --ignore-scripts --no-audit --no-fund
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "token-ledger needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.lock pyproject.toml | $(BIN)/python
	@echo "Installing what the service needs into $(VENV); once, about a minute."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@
