# `make demo` and `make test` are all that a fresh machine with Python 3.10 or later needs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help venv demo test nightly quick lint golden docs docs-serve notebooks versions gpu dist remake-demo clean

help:
	@echo "make demo        one video, dense and sparse on one clock, into outputs/demo/"
	@echo "make test        lint, types and tests, within the CPU seconds of tests/budget.json"
	@echo "make quick       the tests to run all the time, without the slow ones"
	@echo "make nightly     make test with all combinations, compilations and notebooks as stored"
	@echo "make docs        the site of the documentation, into outputs/site"
	@echo "make docs-serve  the site at http://localhost:8000, built again as you write; PORT=8000"
	@echo "make notebooks   run the notebooks and store them with their outputs, some minutes"
	@echo "make versions    the quick tests on the lowest and the highest versions we admit"
	@echo "make gpu         everything a GPU can tell, in MINUTES=9; more of it by RESUME=1"
	@echo "make dist        the sdist, and the wheel from it, into dist/; RELEASE=v0.2.0 checks the tag"
	@echo "make venv        only the environment, in .venv"
	@echo "make remake-demo the demo model and all that hangs on it again; STAGES=--list shows what"

venv: .venv/.ready

.venv/.ready: pyproject.toml
	@echo "Setting up .venv (about a minute) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[cli,combine,cvvdp,data,quality,quantized,ray,scenes,train,ui,dev,docs]"
	@$(BIN)/gen-accel build >/dev/null 2>&1 || echo "CPU attention without a compiler: see gen-accel build"
	@touch $@

demo: venv
	@$(BIN)/gen-accel demo

# Lint, types and the site run beside the tests and speak after them.
test: venv
	@$(BIN)/python tests/run.py

nightly: venv
	@NIGHTLY=1 $(BIN)/python tests/run.py

quick: venv
	@$(BIN)/python tests/run.py --quick

golden: venv
	$(BIN)/python tests/check_golden.py tests/golden

docs: venv
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is in outputs/site"

docs-serve: venv
	@$(BIN)/python docs/.site/serve.py $(or $(PORT),8000)

notebooks: venv
	$(BIN)/python notebooks/store.py

versions:
	tests/versions.sh

# What the benchmarks of a GPU need alone, where there is no .venv yet: a rented minute costs money.
.venv/.gpu: pyproject.toml
	@test -e .venv/.ready || { echo "Setting up .venv ..."; $(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[gpu]"; }
	@touch $@

gpu: .venv/.gpu
	@$(BIN)/python benchmarks/gpu.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(RESUME),--resume)

dist: venv
	$(if $(RELEASE),$(BIN)/python .ci/check_release.py $(RELEASE))
	$(BIN)/python -m build --no-isolation --outdir dist

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

remake-demo: venv
	@PYTHONPATH=examples $(BIN)/python -m demo_model.remake $(STAGES)

clean:
	rm -rf .venv outputs dist .pytest_cache .ruff_cache
