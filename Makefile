# Every target sets up what it needs on a machine that has Python 3.11 or newer, make and access to a package index.
# `make help` lists them. Another interpreter: make PYTHON=/path/to/python3 test

.DEFAULT_GOAL := help
SHELL := /bin/sh
.DELETE_ON_ERROR:

PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
READY := $(VENV)/.made-by-make
CODE := vllm_bootstrap tests scripts bench

# The environment with a real vLLM for the CPU; may be one that exists already.
VLLM_ENGINE_ENV ?= .engine
UV ?= uv
ARGS ?=
COMPILED ?= yes

$(READY): requirements-dev.lock pyproject.toml scripts/make_venv.sh
	@echo "Setting up $(VENV) ..."
	@scripts/make_venv.sh $(VENV) $(PYTHON)
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: setup
setup: $(READY)  ## make .venv from the locked requirements

.PHONY: run server
run server: $(READY)  ## start the daemon on 127.0.0.1:8000 with the settings in .env, if there (ARGS='--port 9000')
	@$(if $(filter no false 0,$(COMPILED) $(VLLM_BOOTSTRAP_COMPILED)),,$(PY) scripts/compile_modules.py --optional)
	$(BIN)/vllm-bootstrap serve $(if $(wildcard .env),--env-file .env) $(ARGS)

.PHONY: compiled
compiled: $(READY)  ## compile the data plane, as `make run` does (needs a C compiler; COMPILED=no leaves it out there)
	@$(PY) scripts/compile_modules.py

.PHONY: demo
demo: $(READY)  ## launch, chat and stop with the simulator: no GPU, no vLLM
	$(BIN)/vllm-bootstrap demo $(ARGS)

.PHONY: test
test: $(READY)  ## all tests but those that need a real vLLM or a GPU
	@$(PY) scripts/run_tests.py $(ARGS)

.PHONY: test-vllm
test-vllm: $(READY)  ## tests against a real vLLM (CPU build, made in .engine/ the first time)
	@$(PY) scripts/engine_env.py $(VLLM_ENGINE_ENV)
	VLLM_ENGINE_ENV=$(VLLM_ENGINE_ENV) $(PY) -m pytest -m vllm tests/vllm $(ARGS)

# Tests that go through the data plane, in this process and in daemons of their own.
COMPILED_TESTS := $(wildcard $(addprefix tests/,integration/gateway integration/scheduler unit/gateway unit/scheduler \
	properties/test_admission.py properties/test_skimming.py acceptance/test_faults_wire.py \
	acceptance/test_faults_traffic.py acceptance/test_openai_client.py acceptance/test_openai_queues.py \
	acceptance/test_requests.py acceptance/test_batch_crashes.py acceptance/test_compiled_daemon.py integration/test_compiled.py))
.PHONY: test-compiled
test-compiled: compiled  ## the data plane's tests once more, on what `make compiled` makes
	$(PY) -m pytest --compiled $(COMPILED_TESTS) $(ARGS)

.PHONY: lint-verify
lint-verify: $(READY)  ## style, formatting and types; changes nothing
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/mypy $(wildcard scripts/*.py)
	$(BIN)/shellcheck -x $(wildcard scripts/*.sh) .ci/run
	$(BIN)/hadolint Dockerfile runtime/Dockerfile

.PHONY: format
format: $(READY)  ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

.PHONY: validate
validate: lint-verify test  ## lint-verify and test

.PHONY: check
check: lint-verify architecture coverage  ## lint-verify, architecture rules, and the tests with the coverage gate

.PHONY: architecture
architecture: $(READY)
	$(PY) -m pytest tests/test_architecture.py tests/test_repository.py

.PHONY: coverage
coverage: $(READY)
	$(BIN)/coverage erase
	@$(PY) scripts/run_tests.py --coverage $(ARGS)
	@$(PY) scripts/check_coverage.py

.PHONY: chaos
chaos: $(READY)  ## random starts, stops and kill -9 of everything, 200 rounds (ARGS='--rounds 1000 --seed 1')
	$(PY) -m bench.chaos $(ARGS)

.PHONY: bench
bench: $(READY)  ## the daemon alone: start, memory, status under polling (every other bench has a command of its own)
	$(PY) -m bench.daemon $(ARGS)

.PHONY: bench-cosched
bench-cosched: $(READY)  ## realtime beside a saturating batch, on a real vLLM for the CPU (ARGS='--engine simulator')
	@case "$(ARGS)" in *simulator*) ;; *) $(PY) scripts/engine_env.py $(VLLM_ENGINE_ENV) ;; esac
	VLLM_ENGINE_ENV=$(VLLM_ENGINE_ENV) $(PY) -m bench.cosched $(ARGS)

.PHONY: bench-proxy
bench-proxy: compiled  ## what a proxied request and chunk cost: nginx, sglang-router, FastAPI + httpx, ours
	$(PY) -m bench.proxy $(ARGS)

.PHONY: bench-batches
bench-batches: $(READY)  ## durable batches: lines a second, a million lines, validation beside realtime, a real vLLM
	@$(PY) scripts/engine_env.py $(VLLM_ENGINE_ENV)
	VLLM_ENGINE_ENV=$(VLLM_ENGINE_ENV) $(PY) -m bench.batches $(ARGS)

.PHONY: bench-models
bench-models: $(READY)  ## models by name: routing, idle catalogue, first token, collation, prefetch (ARGS='names collate')
	@case "$(ARGS)" in *--no-vllm*) ;; *) $(PY) scripts/engine_env.py $(VLLM_ENGINE_ENV) ;; esac
	VLLM_ENGINE_ENV=$(VLLM_ENGINE_ENV) $(PY) -m bench.models $(ARGS)

.PHONY: bench-overload
bench-overload: $(READY)  ## goodput, refusals and memory at 0.5 to 5 times what an engine can do (simulator)
	$(PY) -m bench.overload $(ARGS)

.PHONY: bench-soak
bench-soak: $(READY)  ## 20 minutes of mixed traffic while launches and the daemon are killed (ARGS='--minutes 5 --seed 1')
	$(PY) -m bench.soak $(ARGS)

# Only here uv is needed. [tool.uv] in pyproject.toml says up to which day releases are considered.
COMPILE := $(UV) pip compile -q --universal --generate-hashes --no-header --no-annotate --python-version 3.11
.PHONY: lock
lock:  ## remake the requirements*.lock files (needs uv; LOCK_ARGS=--upgrade for newer releases)
	$(COMPILE) $(LOCK_ARGS) pyproject.toml -o requirements.lock
	$(COMPILE) $(LOCK_ARGS) pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock
	$(COMPILE) $(LOCK_ARGS) --group build -c requirements-dev.lock -o requirements-build.lock

.PHONY: clean
clean:  ## remove what make made, .engine/ included
	rm -rf $(VENV) .engine vllm_bootstrap/_compiled build dist *.egg-info htmlcov coverage.json .coverage* .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z][a-z -]*:.*  ## ' $(MAKEFILE_LIST) | sed 's/:.*  ## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'
