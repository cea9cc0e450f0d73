# The two commands of the README: `make test` and `make repro`. Both make .venv first if it is missing or its pins changed.
# Needs Python 3.11, git and make.
SHELL   := /bin/bash
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= laptop
JOBS    ?=
SHOWN   ?= koeppen clip_fashion seg_climate
VENV    := $(CURDIR)/.venv
STAMP   := $(VENV)/.installed
export PATH := $(VENV)/bin:$(PATH)
TEST_ENV := PYTHONWARNINGS="ignore:IProgress not found" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
NOTEBOOKS = $(shell find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/runs/*' -not -path 'nbs/tables/*' -not -path 'nbs/data/embedded/packs/*' | sort)
README   = jupyter nbconvert --log-level=WARN --to markdown --RegexRemovePreprocessor.patterns='^\#\| *hide' --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=remove_input nbs/index.ipynb --output README --output-dir

.PHONY: help setup test repro profile notebooks export-check notebook-tests smoke pytest showcase readme readme-check

help:
	@echo "make test                       everything that must hold before a commit"
	@echo "make repro                      rebuild all results of the laptop profile, compare them with the committed ones"
	@echo "make profile PROFILE=reference  change the active profile; then: hierprompt repro"
	@echo "make notebooks                  execute the documentation notebooks in place"
	@echo "make showcase                   copy one executed run per method to results/PROFILE/showcase"
	@echo "make readme                     README.md from nbs/index.ipynb"

setup: $(STAMP)
$(STAMP): settings.ini setup.py constraints.txt
	@test -x $(VENV)/bin/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned versions into $(VENV) (minutes, once)"
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	@touch $@

test: setup export-check readme-check notebook-tests smoke pytest

repro: setup
	hierprompt profile $(PROFILE) --check
	hierprompt repro --force $(if $(JOBS),--jobs $(JOBS))
	hierprompt compare --profile $(PROFILE)

profile: setup
	hierprompt profile $(PROFILE)

notebooks: setup
	@for notebook in $(NOTEBOOKS); do echo "$$notebook"; \
	  $(TEST_ENV) jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace $$notebook || exit 1; done
	nbdev_clean

# Exporting and cleaning must change nothing, files that git does not know yet included.
export-check: setup
	@echo "== notebooks are exported and clean"
	@listing() { git ls-files -co --exclude-standard -z | sort -z -u | xargs -0 -r sha256sum 2>/dev/null || true; }; \
	  before=$$(mktemp); listing > $$before; nbdev_export && nbdev_clean || exit 1; \
	  if listing | diff $$before - | sed -n 's/^[<>] [0-9a-f]*  /changed: /p' | sort -u | grep .; then \
	    echo "run nbdev_export and nbdev_clean, then commit the files above"; exit 1; fi; rm -f $$before

# One executed run per method, for readers: the runs of one task and of one with names, without the marks of papermill.
showcase: setup
	@mkdir -p results/$(PROFILE)/showcase
	@for task in $(SHOWN); do for run in results/$(PROFILE)/notebooks/*-$$task.ipynb; do case $$run in */data-*) ;; *) \
	  cp $$run results/$(PROFILE)/showcase/$$(basename $$run -$$task.ipynb).ipynb ;; esac; done; done
	nbdev_clean --fname results/$(PROFILE)/showcase

readme:
	$(README) .

readme-check: setup
	@echo "== README.md agrees with nbs/index.ipynb"
	@folder=$$(mktemp -d) && $(README) $$folder && for file in $$(cd $$folder && find . -type f); do \
	  cmp $$folder/$$file $$file || { echo "run make readme, then commit"; exit 1; }; done; rm -r $$folder

notebook-tests: setup
	@echo "== notebooks run"
	$(TEST_ENV) nbdev_test --n_workers 2 --do_print

smoke: setup
	@echo "== the smoke profile, from a fresh copy to the tables"
	$(TEST_ENV) python tests/smoke.py

pytest: setup
	@echo "== pytest"
	$(TEST_ENV) python -m pytest tests --durations 10 --numprocesses 2 --dist loadfile --no-loadscope-reorder
