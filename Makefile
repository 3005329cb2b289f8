# Everything runs in .venv, which is made and refreshed when pyproject.toml changes; the pages are built in a light
# environment of their own, .venv-docs, since building them executes nothing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NOTEBOOKS := $(wildcard book/*.ipynb)
# One process a core, each with one thread (conftest.py); who is done early takes tests from another.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
NBVAL := $(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=900 -q -n 2 --dist loadfile

.PHONY: help venv book test unit quick lint notebooks colab-check links pictures repro demo zoo tuned encoder table family bench bench-gpu browser screenshots clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

venv: .venv/installed  ## make the virtual environment

RECENT = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11'; exit 1; }

.venv/installed: pyproject.toml minipact/version.py
	@$(RECENT)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary -e '.[book,docs,test,encoder]'
	touch $@

.venv-docs/installed: pyproject.toml
	@$(RECENT)
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python tools/extra.py docs > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary -r .venv-docs/requirements.txt
	touch $@

book: .venv-docs/installed  ## build the book into _build/html, without executing it: a minute, no torch
	.venv-docs/bin/jupyter-book build . -W -n --keep-going

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

notebooks: venv  ## write the notebooks' first cells, and execute those whose code has changed
	$(if $(NOTEBOOKS),$(BIN)/python tools/first_cells.py $(NOTEBOOKS))
	$(if $(NOTEBOOKS),$(BIN)/python tools/execute.py --stale $(NOTEBOOKS))

colab-check: venv  ## every notebook as on Colab: from an empty folder, with a local clone (half an hour on 2 cores)
	MINIPACT_COLAB=all $(PYTEST) tests/test_first_cells.py

links: .venv-docs/installed  ## list all addresses on the web that the texts name; make links CHECK=--check asks each of them
	.venv-docs/bin/python tools/links.py $(CHECK)

pictures: venv  ## draw the pictures of README and introduction again
	$(BIN)/python tools/pictures.py

repro: venv  ## the notebooks' results again: 1 and 2 threads, and plain CPU kernels
	OMP_NUM_THREADS=1 $(NBVAL) $(NOTEBOOKS)
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(NBVAL) $(NOTEBOOKS)
	ATEN_CPU_CAPABILITY=default $(NBVAL) $(NOTEBOOKS)

demo: venv  ## merge the zoo's eight models, and print accuracies beside the base and the single models
	$(BIN)/python tools/demo.py

zoo: venv  ## retrain the mini zoo of seed 0 from nothing (about 25 minutes on 2 cores)
	$(BIN)/python data/train_zoo.py --seed 0 --out data/zoo --table data/seeds.csv

tuned: venv  ## train the tasks of zoo 0 with merging in mind: TaLoS, ATM, aTLAS (an hour or more on 2 cores)
	$(BIN)/python data/tuned_to_merge.py --seed 0

encoder: venv  ## fine-tune the real encoder again on its eight text tasks (about 30 minutes on 2 cores)
	$(BIN)/python data/train_encoder.py

STAGE = xargs -P 2 -L 1 sh -c '$(BIN)/python data/fair_table.py --model $$0 --stage $$1'

table: venv  ## measure what the fair table lacks (hours on 2 cores; goes on where it stopped)
	printf '%s\n' 'encoder settings' 'zoo0 settings' | $(STAGE)
	printf '%s\n' 'encoder final' 'zoo0 final' 'zoo1 final' 'zoo2 final' | $(STAGE)
	printf '%s\n' 'encoder_unseen unseen' 'zoo1 unseen' 'zoo2 unseen' | $(STAGE)

family: venv  ## measure what the table of the whole family lacks (an hour of one core; goes on where it stopped)
	for part in zoo0 zoo1 zoo2 counts encoder; do $(BIN)/python data/family.py --part $$part || exit 1; done
	$(BIN)/python data/costs.py

bench: .venv-bench/installed  ## speed and memory next to mergekit and fusion-bench, as JSON in benchmarks/results
	PYTHONPATH=. .venv-bench/bin/python benchmarks/full_scale.py
	PYTHONPATH=. .venv-bench/bin/python benchmarks/randomized.py
	PYTHONPATH=.:data .venv-bench/bin/python benchmarks/peers.py
	PYTHONPATH=. .venv-bench/bin/python benchmarks/disk.py

bench-gpu: venv  ## where the time of a merge goes on a GPU, as JSON in benchmarks/results (says so where none is)
	$(BIN)/python benchmarks/gpu.py

.venv-bench/installed: .venv/installed benchmarks/peers.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$(.venv-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	touch $@

# PAGES=intro,06_pact tests these; without it, all.
PAGES ?=
browser: book .venv-docs/browser  ## read the built book in a browser: every page, three widths, two themes (an hour or so)
	.venv-docs/bin/python -m pytest tests/browser -n 2 --pages '$(PAGES)'

.venv-docs/browser: .venv-docs/installed
	.venv-docs/bin/python tools/extra.py browser > .venv-docs/browser.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary -r .venv-docs/browser.txt
	touch $@

screenshots: .venv-docs/browser  ## pages of the built book as pictures: three widths, light and dark
	.venv-docs/bin/python tools/screenshots.py

clean:  ## remove what the other targets made
	rm -rf _build .venv .venv-docs .venv-bench screenshots minipact.egg-info .mypy_cache .ruff_cache .hypothesis
