# `make` alone explains itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLWR_MIN := $(shell sed -n 's/.*"flwr>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help install simulate laboratory test test-quick test-slow test-flwr-min test-trackers test-peers test-deployment benchmark docs lint config format release clean

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

install: $(READY) ## Create .venv with the project and all it needs

simulate: $(READY) ## CIFAR-10, 40 % hostile clients: averaging, GMD and BGMD side by side
	$(BIN)/python -m simulations compare mean gmd bgmd+nearest-neighbor gap-filter \
		--attack bit-flip --byzantine-fraction 0.4 --evaluate-every 5

TEST_JOBS ?= auto
# The tests start a hundred processes: each would compile this project's modules anew.
TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
test: $(READY) ## The test suite, in as many processes as there are cores (TEST_JOBS)
	$(TESTS) $(BIN)/python -m pytest -n $(TEST_JOBS) --maxprocesses 8 --dist worksteal \
		-m "not slow and not deployment"

benchmark: $(READY) ## Time the rules against a plain sum and against the peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check byzfl geom-median
	$(BIN)/python -m benchmarks.aggregators
	$(BIN)/python -m benchmarks.aggregate_train
	$(BIN)/python -m benchmarks.compression
	$(BIN)/python -m benchmarks.grid

LABORATORY := $(basename $(notdir $(wildcard simulations/studies/laboratory*.toml)))
laboratory: $(READY) ## Rules and pipelines against attacks that search, to convergence (a day)
	for study in $(LABORATORY); do \
	$(BIN)/python -m simulations reproduce $$study $(if $(SEEDS),--seeds $(SEEDS)) || exit 1; done

QUICK := aggregators/test_build_rule.py aggregators/test_clipping_mixings.py \
	aggregators/test_selection_rules.py attacks/test_attacks.py attacks/test_history.py \
	compression/test_own_compressor.py core/test_held.py core/test_options.py core/test_replies.py \
	core/test_wire.py project/test_contributing.py project/test_declarations.py \
	project/test_flower_names.py simulations/test_config.py strategies/test_estimate.py \
	strategies/test_logs.py strategies/test_rounds.py strategies/test_stale.py
test-quick: $(READY) ## A few tests of each part, for the daily loop
	$(TESTS) $(BIN)/python -m pytest -q -n $(TEST_JOBS) --maxprocesses 8 \
		$(addprefix tests/,$(QUICK))

test-slow: $(READY) ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

test-flwr-min: ## The test suite with the oldest flwr supported, in .venv-flwr-min
	$(PYTHON) -m venv $(VENV)-flwr-min
	$(VENV)-flwr-min/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable ".[dev]" "flwr[simulation]==$(FLWR_MIN)"
	$(TESTS) $(VENV)-flwr-min/bin/python -m pytest -n $(TEST_JOBS) --maxprocesses 8 \
		--dist worksteal -m "not slow and not deployment"
	$(VENV)-flwr-min/bin/python -m pytest tests/simulations/test_flwr_run.py

test-trackers: $(READY) ## The examples with W&B and MLflow, offline (50 packages more)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[trackers]"
	$(BIN)/python -m pytest tests/project/test_trackers.py

test-peers: $(READY) ## Against what others have: ByzFL's rules, training with Opacus
	$(BIN)/python -m pip install --quiet --disable-pip-version-check byzfl opacus
	$(BIN)/python -m pytest tests/aggregators/test_byzfl.py tests/project/test_other_apps.py

test-deployment: $(READY) ## `flwr run`; a SuperLink and SuperNodes as network namespaces (root)
	$(BIN)/python -m pytest -m deployment

docs: $(READY) ## The documentation site, in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	$(BIN)/mkdocs build --quiet

lint: $(READY) ## Linters and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

config: $(READY) ## Write what follows from the options' declarations: pyproject.toml, strategies/typed.py
	$(BIN)/python -m simulations.config
	$(BIN)/python -m strategies.generate

release: $(READY) ## Build sdist and wheel and try them in clean environments (TRIAL=1: any commit)
	$(BIN)/python .ci/release $(if $(TRIAL),--trial)

clean: ## Remove the environment and caches
	rm -rf $(VENV) $(VENV)-flwr-min site .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
