# For GNU make 3.81 (macOS) and newer, and any POSIX shell. `make` alone lists the targets.

ARGS :=
# One more than there are cores: many tests wait for a broker.
JOBS := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
RABBITMQ4 := build/rabbitmq4
PYTHON := python3.13 python3.12 python3.11 python3
BIN := .venv/bin

# The stamp holds the folder that was set up: in a checkout that was moved, or whose Python is gone, .venv is made anew.
INSTALLED := .venv/.installed
VENV := $(shell [ "$$(cat $(INSTALLED) 2>/dev/null)" = "$(CURDIR)" ] && $(BIN)/python -V >/dev/null 2>&1 || echo venv)

.PHONY: help setup venv demo test test-rabbitmq4 check format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## everything the others need: .venv with the package; RabbitMQ and PostgreSQL if missing

demo: setup ## a federation on this machine; ARGS="--help" lists its options
	@$(BIN)/broker-fl demo $(ARGS)

test: check ## check, then the tests on private servers, for each of JOBS its own; ARGS="-k name" chooses among them
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-rabbitmq4: setup ## the tests that touch RabbitMQ, on a RabbitMQ 4.0 that is unpacked into build/ first
	@sh deploy/install_rabbitmq4.sh $(RABBITMQ4)
	@version=$$(cat $(RABBITMQ4)/version) && echo "On RabbitMQ $$version:" && \
	BROKER_FL_RABBITMQ_SERVER=$(CURDIR)/$(RABBITMQ4)/bin/rabbitmq-server TESTS_RABBITMQ_VERSION=$$version \
		$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m rabbitmq $(ARGS)

check: setup ## format, lint, types and the floor plan of the imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## sort the imports, mend what ruff can, and format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove what was built and cached, but not .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt $(VENV)
	@echo "Installing into .venv (the first time takes some minutes: PyTorch is large)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@sh deploy/install_rabbitmq.sh
	@sh deploy/install_postgresql.sh
	@echo "$(CURDIR)" > $@

# Keeps a working .venv that only lacks its stamp: an installation that was interrupted goes on where it was.
# Debian and Ubuntu ship Python without ensurepip, which the venv module needs.
venv:
	@if [ ! -e $(INSTALLED) ] && $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	found= ready=; \
	can_make_venv() { "$$1" -c 'import ensurepip, venv' 2>/dev/null; }; \
	for python in $(PYTHON); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		found=$${found:-$$python}; \
		if can_make_venv "$$python"; then ready=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "Python 3.11 or newer is needed; tried: $(PYTHON)." >&2; \
		echo "Install it (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.13)," >&2; \
		echo "or name the one to use: make setup PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	if [ -z "$$ready" ]; then \
		package=$$("$$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		if [ "$$(id -u)" = 0 ]; then sudo=; else sudo='sudo -n'; fi; \
		if command -v apt-get >/dev/null && $$sudo true 2>/dev/null; then \
			$$sudo apt-get update; \
			$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$$package"; \
		fi; \
		if ! can_make_venv "$$found"; then \
			echo "$$found cannot make virtual environments: apt install python3-venv (or $$package)," >&2; \
			echo "or name another Python: make setup PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		ready=$$found; \
	fi; \
	echo "Making .venv with $$("$$ready" -V)"; \
	"$$ready" -m venv --clear .venv
