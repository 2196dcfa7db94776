# From a fresh clone: `make demo`, `make test`. Each makes .venv first if it is not there; pip is all it needs.

PYTHON  ?= python3
# Half of the time a test waits for processes that it has started.
WORKERS ?= 3
SLOW    ?= 0
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
EXTRAS  := $(VENV)/.extras

# Each of the hundreds of processes that the tests start would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install demo test ci-slow lint docs oldest rounding faults restarts bench clean

install: $(STAMP)
	@:

# A folder that was moved, or an interpreter that was replaced, leaves a .venv that cannot run: it is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "guardrail needs Python 3.11 or newer; try: make install PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,stacks,tensorboard,trainer]'
	@touch $@

# What the extras read, write and train is tested with the real libraries.
$(EXTRAS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[dev,docs,hf,notify,plot,stacks,tensorboard,trainer,wandb,web]'
	@touch $@

# With a terminal the screen opens, without one there is a line for every 20 steps. The report comes in any case.
demo: install
	$(BIN)/python -m demo.corpus --out demo/corpus
	@$(BIN)/guardrail launch configs/quickstart.toml --set 'data.sources=["demo/corpus"]'; code=$$?; \
	  $(BIN)/guardrail report && exit $$code

test: $(EXTRAS)
	$(PYTEST) $(if $(filter 0,$(SLOW)),-m 'not slow and not ci_slow') $(PYTEST_ARGS)

# What .ci/run runs after the tests: sharded runs of more kinds, more kills, 500 damaged copies of each configuration.
ci-slow: $(EXTRAS)
	$(PYTEST) -m ci_slow $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages of docs/ as a site in build/site; a broken link or a page that is not in the navigation fails.
docs: $(EXTRAS)
	$(BIN)/python -m tests.support.make_docs --check
	$(BIN)/python -m mkdocs build --strict --quiet

# The tests with the oldest versions that pyproject.toml allows, in an environment of their own (3 GB with a CUDA torch).
OLDEST := build/oldest
oldest: $(STAMP)
	@mkdir -p $(OLDEST)
	$(BIN)/python -m tests.support.oldest > $(OLDEST)/constraints.txt
	@$(OLDEST)/venv/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(OLDEST)/venv
	$(OLDEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
	  -e '.[dev,hf,notify,plot,stacks,tensorboard,trainer,web]'
	$(OLDEST)/venv/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m 'not slow and not ci_slow' $(PYTEST_ARGS)

# The tests that train a model, with initial weights changed by 1e-6 (three seeds), and with the kernels of older CPUs:
# none of them may depend on the rounding of one machine.
TRAINING = $(shell grep -El 'tests\.support\.(running|tiny|jumping)|trainer\.train' -r tests --include='test_*.py')
rounding: $(EXTRAS)
	@set -e; for seed in 1 2 3; do echo "initial weights changed by 1e-6, seed $$seed"; \
	  GUARDRAIL_PERTURB=$$seed $(PYTEST) -m 'not slow and not ci_slow' $(PYTEST_ARGS) $(TRAINING); done
	@set -e; for isa in default avx2; do echo "ATEN_CPU_CAPABILITY=$$isa"; \
	  ATEN_CPU_CAPABILITY=$$isa $(PYTEST) -m 'not slow and not ci_slow' $(PYTEST_ARGS) $(TRAINING); done

# The tests of each known fault, and the faults that have none.
faults: $(EXTRAS)
	$(BIN)/python -m tests.support.faults

# Whether a run recovers from each kind of failure, 20 times each, and a table. About two hours on two cores.
RUNS ?= 20
restarts: $(EXTRAS)
	@$(BIN)/python -m tests.bench.restarts --runs $(RUNS)

bench: install
	@set -e; for file in $(filter-out tests/bench/restarts.py,$(wildcard tests/bench/*.py)); do echo "$$file"; $(BIN)/python -m tests.bench.$$(basename "$$file" .py); done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
