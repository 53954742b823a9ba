# Every target prepares what it needs; `make` alone lists them.
#   PYTHON  the interpreter that .venv is made with (>= 3.10)
#   TORCH   the torch requirement, to choose a build, e.g. TORCH='torch==2.13.0+cpu'
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed
BENCH_BIN := .venv-bench/bin
BENCH_STAMP := .venv-bench/.installed
LOWEST_BIN := .venv-lowest/bin
LOWEST_STAMP := .venv-lowest/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2
# The contract, the engines and what else leans on torch, numpy, matplotlib, Pillow, wandb and safetensors.
CORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,\
    checkpoint compiled_step compiler_cache evaluate evolution execution few_shot_tasks forward implicit inner kept_libraries \
    layout lstm_kernel optim persistent resume tracker train_meta trainer unrolled wandb_tracker))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long install-lowest test-lowest lint results docs docs-serve bench bench-scaling soak wheel-check \
    wheel-prebuilt release clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install everything into it (the other targets do this by themselves)

# torch goes first and alone: a later resolution then keeps the build that was chosen here.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "$(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv \
	    || { rm -rf .venv; echo "$(PYTHON) cannot make virtual environments; install its venv module"; exit 1; }
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## meta-train an LSTM optimizer and compare it with tuned Adam (a minute or two)
	$(BIN)/python train_meta.py demo

# The types are checked beside the first tests, on what the workers leave idle; what is wrong with them is said last.
test: $(STAMP)  ## lint, and run the tests
	$(BIN)/ruff check --quiet
	@mkdir -p build; $(BIN)/pyright --level error >build/pyright.log 2>&1 & types=$$!; \
	    $(PYTEST) -m 'not long'; tests=$$?; \
	    wait $$types || { cat build/pyright.log; exit 1; }; exit $$tests

test-long: $(STAMP)  ## run the tests that take longer
	$(PYTEST) -m long

test-lowest: $(LOWEST_STAMP)  ## run the core tests on the lowest versions that pyproject.toml admits
	OMP_NUM_THREADS=1 $(LOWEST_BIN)/pytest -q -n 2 -m 'not long' $(CORE_TESTS)

install-lowest: $(LOWEST_STAMP)  ## create .venv-lowest with those versions (several GB where torch comes with CUDA)

lint: $(STAMP)  ## check style (ruff) and types (pyright)
	$(BIN)/ruff check --quiet
	$(BIN)/pyright --level error

# pip has no such resolution; uv reads the bounds from pyproject.toml. It does not read pip's settings: for a build of
# torch without CUDA say UV_TORCH_BACKEND=cpu.
$(LOWEST_STAMP): pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST_BIN)/pip install --quiet -c constraints.txt uv
	VIRTUAL_ENV=.venv-lowest $(LOWEST_BIN)/uv pip install --quiet --resolution lowest-direct -r pyproject.toml --extra test
	VIRTUAL_ENV=.venv-lowest $(LOWEST_BIN)/uv pip install --quiet --no-deps -e .
	@touch $@

results: $(STAMP)  ## redo the numbers and figures of docs/results.md (benchmarks/results_*.py; hours)
	@for script in benchmarks/results_*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# The site lies in a copy of what its pages link to beside docs/, so that these links hold.
docs: $(STAMP)  ## build the documentation site into build/site; a warning is an error
	rm -rf build/site
	$(BIN)/zensical build --clean --strict
	cp -R examples README.md CHANGELOG.md CONTRIBUTING.md build/site

docs-serve: $(STAMP)  ## show the documentation site while it is written
	$(BIN)/zensical serve

bench: $(BENCH_STAMP)  ## measure time and memory beside other libraries into docs/benchmarks.md (20 minutes)
	$(BENCH_BIN)/python benchmarks/bench.py

bench-scaling: $(BENCH_STAMP)  ## measure time and memory against size into docs/benchmarks.md (10 minutes)
	$(BENCH_BIN)/python benchmarks/bench.py --scaling

soak: $(STAMP)  ## kill real trainings and disturb them in other ways (20 minutes; runs/soak, docs/reliability.md)
	$(BIN)/python benchmarks/soak.py --minutes 20

# The C in learn2learn's source archive was generated for Python 3.10 and older; build_ext has it generated anew. What it
# requires itself (data sets, environments of gym) is not needed for what is measured. An environment of its own: what it
# installs as `tests` would hide the tests here, and JAX warns where a process forks.
$(BENCH_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	$(BENCH_BIN)/pip install --quiet '$(TORCH)'
	$(BENCH_BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BENCH_BIN)/pip install --quiet -c constraints.txt --no-deps --use-pep517 --config-settings=--build-option=build_ext \
	    learn2learn || echo "learn2learn does not build here: its rows will say so, the others are measured"
	@touch $@

wheel-check: $(STAMP)  ## build the wheel, install it into an empty environment and inspect it there
	$(BIN)/python .ci/check_wheel.py '$(TORCH)'

wheel-prebuilt: $(STAMP)  ## build dist/*-linux_x86_64.whl, which brings the compiled steps along (docs/platforms.md)
	LEARNEDOPT_PREBUILT=1 $(BIN)/python -m build --wheel

release: $(STAMP)  ## say what releasing VERSION=x.y.z would do; GO=1 does it: checked archives in dist/, commit, tag
	$(BIN)/python .ci/release.py '$(VERSION)' --torch '$(TORCH)' $(if $(GO),--go)

clean:  ## remove build products and caches; runs/ and environments stay
	rm -rf build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
