# `make demo` and `make test` are all that a fresh machine with Python 3.10 or later needs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo test quick lint train-demo train-lora clean

help:
	@echo "make demo        dense and sparse video side by side, into outputs/demo/"
	@echo "make test        lint, types and all tests"
	@echo "make quick       the tests to run all the time, without the slow ones"
	@echo "make venv        only the environment, in .venv"
	@echo "make train-demo  train the demo model again, about two hours on 2 cores"
	@echo "make train-lora  train its LoRA for longer videos again"

venv: .venv/.ready

.venv/.ready: pyproject.toml
	@echo "Setting up .venv (about a minute) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all,dev]"
	@$(BIN)/gen-accel build >/dev/null 2>&1 || echo "CPU attention without a compiler: see gen-accel build"
	@touch $@

demo: venv
	@$(BIN)/gen-accel demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	$(BIN)/python tests/check_golden.py tests/golden

quick: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

train-demo: venv
	PYTHONPATH=examples $(BIN)/python -m demo_model.train

train-lora: venv
	$(BIN)/python -m gen_accel.demo.clips --out outputs/clips --frames 129 --count 1200
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml \
		-m gen_accel train configs/lora/demo.yaml
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml \
		-m gen_accel train configs/lora/demo_guided.yaml

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache
