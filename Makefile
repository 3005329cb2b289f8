# Everything runs in .venv, which is made and refreshed when pyproject.toml changes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NOTEBOOKS := $(wildcard book/*.ipynb)
# One process a core, each with one thread (conftest.py); who is done early takes tests from another.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
NBVAL := $(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=900 -q -n 2 --dist loadfile

.PHONY: help venv book test unit quick lint notebooks repro demo zoo encoder table bench screenshots clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

venv: .venv/installed  ## make the virtual environment

.venv/installed: pyproject.toml minipact/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or newer is needed: make PYTHON=/path/to/python3.11'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary -e '.[book,test,encoder]'
	touch $@

book: venv  ## build the book into _build/html, without executing it
	$(BIN)/jupyter-book build . -W -n --keep-going

test: unit  ## lint, types, unit tests, and the notebooks' results
	$(if $(NOTEBOOKS),$(NBVAL) $(NOTEBOOKS))

unit: lint
	$(PYTEST)

quick: lint  ## lint, types, and the unit tests that take no more than two seconds
	$(PYTEST) -m 'not slow'

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: venv  ## execute the notebooks in place
	$(if $(NOTEBOOKS),$(BIN)/python tools/execute.py $(NOTEBOOKS))

repro: venv  ## the notebooks' results again: 1 and 2 threads, and plain CPU kernels
	OMP_NUM_THREADS=1 $(NBVAL) $(NOTEBOOKS)
	OMP_NUM_THREADS=2 $(NBVAL) $(NOTEBOOKS)
	ATEN_CPU_CAPABILITY=default $(NBVAL) $(NOTEBOOKS)

demo: venv  ## merge the zoo's eight models, and print accuracies beside the base and the single models
	$(BIN)/python tools/demo.py

zoo: venv  ## retrain the mini zoo of seed 0 from nothing (about 25 minutes on 2 cores)
	$(BIN)/python data/train_zoo.py --seed 0 --out data/zoo --table data/seeds.csv

encoder: venv  ## fine-tune the real encoder again on its eight text tasks (about 30 minutes on 2 cores)
	$(BIN)/python data/train_encoder.py

STAGE = xargs -P 2 -L 1 sh -c '$(BIN)/python data/fair_table.py --model $$0 --stage $$1'

table: venv  ## measure what the fair table lacks (hours on 2 cores; goes on where it stopped)
	printf '%s\n' 'encoder settings' 'zoo0 settings' | $(STAGE)
	printf '%s\n' 'encoder final' 'zoo0 final' 'zoo1 final' 'zoo2 final' | $(STAGE)
	printf '%s\n' 'encoder_unseen unseen' 'zoo1 unseen' 'zoo2 unseen' | $(STAGE)

bench: .venv-bench/installed  ## speed and memory next to mergekit and fusion-bench, as JSON in benchmarks/results
	PYTHONPATH=. .venv-bench/bin/python benchmarks/full_scale.py
	PYTHONPATH=. .venv-bench/bin/python benchmarks/randomized.py

.venv-bench/installed: .venv/installed benchmarks/peers.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$(.venv-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	touch $@

screenshots: venv  ## pages of the built book, desktop and phone, light and dark
	$(BIN)/python tools/screenshots.py

clean:  ## remove what the other targets made
	rm -rf _build .venv .venv-bench screenshots minipact.egg-info .mypy_cache .ruff_cache .hypothesis
