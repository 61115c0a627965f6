# The front door. `make pretrain` and `make test` set up everything they need, once.

VENV := .venv
# Not PYTHON: that is the user's, for tools/find_python.sh.
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
DATA := data/stdlib
RUN := runs
STEPS := 500
JOBS := 2

.PHONY: setup pretrain compare test lint gpu-test help

help:
	@echo "make setup      virtual environment with the pinned packages (the other targets do it too)"
	@echo "make pretrain   train a small mHC GPT on real text, on this machine's CPU"
	@echo "make compare    the same for plain, unconstrained and sinkhorn, in one plot"
	@echo "make test       all tests that need no GPU, JOBS=2 files at a time"
	@echo "make lint       ruff, check and format"
	@echo "make gpu-test   the tests that need a GPU (run on a GPU host)"

setup: $(STAMP)

$(STAMP): setup.py constraints.txt tools/find_python.sh
	python=$$(sh tools/find_python.sh) && $$python -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

pretrain: $(STAMP)
	$(PY) tools/prepare_data.py --stdlib --output-prefix $(DATA)
	$(PY) tools/pretrain_small.py --data $(DATA) --run $(RUN)/pretrain --steps $(STEPS)

compare: $(STAMP)
	$(PY) tools/prepare_data.py --stdlib --output-prefix $(DATA)
	$(PY) tools/pretrain_small.py --data $(DATA) --run $(RUN)/compare --steps $(STEPS) --compare

test: $(STAMP)
	$(PY) -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

gpu-test:
	python3 -m pytest tests/gpu
