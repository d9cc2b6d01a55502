# make run   train ResNet-8 on the embedded digits and say where everything is
# make test  everything that CI checks
# make lint  the part of it that only reads the code (ruff.toml), in a second
# make lab   JupyterLab on the notebooks
# Each makes .venv by itself. PYTHON=python3.12 chooses the interpreter (3.11 to 3.13), TORCH_INDEX=URL where torch comes from (README).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
COMPILE := $(BIN)/python -m compileall -q -j 0 -x "/tests?/" .venv/lib >/dev/null 2>&1 || true # on all cores; pip would use one
INPUTS := settings.ini setup.py constraints.txt

.PHONY: run test lint lab slow notebooks filter clean
run: .venv/ready
	@mkdir -p runs
	$(BIN)/papermill nbs/train.ipynb runs/quickstart.ipynb -p optimizer adamw
	@$(BIN)/dkd runs --last 1
	@$(BIN)/dkd runs --last 1 --paths

test: lint
	$(BIN)/python -m pytest -q tests -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=10
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive WANDB_MODE=offline $(BIN)/nbdev_test --n_workers 2 --timing

# a second without a cache, which would be one more folder in the tree
lint: .venv/ready-dev
	$(BIN)/ruff check --no-cache drifting_kd nbs tests benchmarks .ci setup.py

lab: .venv/ready filter
	JUPYTER_CONFIG_PATH=$(CURDIR)/.ci $(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs $(LAB)

slow: .venv/ready-dev
	$(BIN)/python -m pytest -q tests --durations=10
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive WANDB_MODE=offline $(BIN)/nbdev_test --n_workers 2 --timing --flags slow

# what a contributor runs before a commit: library from notebooks, names and ranges for dkd, notebooks without noise
notebooks: .venv/ready-dev filter
	$(BIN)/nbdev_export
	$(BIN)/python -m drifting_kd.known
	$(BIN)/nbdev_clean

# git then sees no change in a notebook that was only run and saved; without .venv it sees the file as it is
filter:
	@test ! -e .git || git config filter.notebooks.clean 'test -x $(BIN)/python || exec cat; $(BIN)/python .ci/clean_notebook.py' || true

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is `$(PYTHON) -V`. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/ready-dev: EXTRA := [dev]
.venv/ready .venv/ready-dev: .venv/bin/python $(INPUTS)
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) -e ".$(EXTRA)"
	@$(COMPILE)
	@touch .venv/ready $@

clean:
	rm -rf .venv build *.egg-info
