# Start with `make demo` or `make test`: both create the virtual environment on first use.
# For another torch, interpreter or folder: make clean, then make test TORCH=torch PYTHON=python3.12 VENV=/tmp/venv
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
TESTS ?= not slow

BIN = $(VENV)/bin
MARKDOWN = CHANGELOG.md CONTRIBUTING.md README.md .github docs zoo_hook
STAMP = $(VENV)/.installed
DEMO = runs/demo
ENV = Pendulum-v1
AGENT = --algo ppo_kl --env $(ENV) -f $(DEMO)

unexport PYTHONDONTWRITEBYTECODE

SHELL = bash
.SHELLFLAGS = -eu -o pipefail -c

.PHONY: demo test test-oldest lint type format docs dist benchmark clean

# Train, evaluate over 100 episodes and record a video with RL Baselines3 Zoo's own commands, then plot the
# training run and compare with PPO on a few seeds: 14 minutes of CPU time, on two cores, after the installation
demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/python -m rl_zoo3.train $(AGENT) --seed 1 --num-threads 1 --eval-freq -1 --verbose 0 -P -tb $(DEMO)/tensorboard
	$(BIN)/python -m rl_zoo3.enjoy $(AGENT) --no-render -n 20000 | tail -n 3
	SDL_VIDEODRIVER=dummy $(BIN)/python -m rl_zoo3.record_video $(AGENT) -n 500 2>&1 | tail -n 1
	$(BIN)/python examples/training_curves.py $(DEMO)/tensorboard/$(ENV)/AdaptiveKLPPO_1 -o $(DEMO)/training.png
	$(BIN)/sb3-adaptive-kl compare --env $(ENV) --algo ppo_kl ppo --seeds 3 --jobs 2 -o $(DEMO)/compare

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "$(TESTS)"

# With the lower bounds of pyproject.toml, on Python 3.10 or 3.11, for which their wheels exist: make test-oldest PYTHON=python3.10
# gymnasium 1.0 compiles Box2D, with swig and a C++ compiler. -W default: old packages warn about newer ones
test-oldest:
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet swig uv
	PATH="$(abspath $(VENV)-oldest/bin):$$PATH" uv pip install --python $(VENV)-oldest --resolution lowest-direct \
		--reinstall-package sb3-adaptive-kl-zoo --editable ".[dev]"
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadgroup -m "not slow" -W default

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mdformat --check $(MARKDOWN)

type: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mdformat $(MARKDOWN)

# The site in docs/_build/html. The notebook is executed unless its outputs are in the cache beside it
docs: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# What is published, of the last commit, in dist/: requires `pip install build twine`. In a clone, the extra `zoo` takes the start-up
# hook from its folder; a published package names its version. If the first replacement fails, the second lets the build fail
dist:
	rm -rf dist
	mkdir -p dist/source
	git archive HEAD | tar -xf - -C dist/source
	git show HEAD:pyproject.toml | sed -e 's|zoo @ {root:uri}/zoo_hook|zoo>=1,<2|' \
		-e 's|allow-direct-references = true|allow-direct-references = false|' > dist/source/pyproject.toml
	$(PYTHON) -m build --outdir dist dist/source
	$(PYTHON) -m build --outdir dist dist/source/zoo_hook
	rm -r dist/source
	$(PYTHON) -m twine check --strict dist/*

benchmark: $(STAMP)
	$(BIN)/python -m benchmarks.throughput

clean:
	rm -rf $(VENV) $(VENV)-oldest runs dist docs/_build

# Install torch first and by itself: the user chooses the build (CPU, CUDA), and the newest may bring gigabytes of CUDA packages.
# Reinstall when the start-up hook changes, because it is copied.
# Without --no-compile, pip compiles all modules of all packages; most are never imported. Python compiles the others when they are
# first imported, and must be allowed to keep them: the tests start many processes
$(STAMP): pyproject.toml zoo_hook/pyproject.toml $(wildcard zoo_hook/sb3_adaptive_kl_zoo.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	touch $@
