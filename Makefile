# Every target installs what it needs; only python3 >= 3.11 with pip and venv must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint typecheck chaos chaos-slurm slurm-up slurm-down bench-data bench-step bench-launching bench-gpu bench-saving bench-checks bench-demo bench-together clean help

help:
	@echo "make demo        install, then train, distil, fine-tune and test the tiny rows (some minutes on 2 cores)"
	@echo "make test        install the test extra and run the whole suite"
	@echo "make test-fast   only the tests that start no processes and take no more than seconds; no SLURM"
	@echo "make lint        check style (ruff) and types (mypy --strict)"
	@echo "make typecheck   only the types"
	@echo "make chaos       inject FAULTS=50 faults into a real run; its weights must equal those of an undisturbed run;"
	@echo "                 GROUP=2 or 3: into that many pre-trainings that share their teachers, against each alone"
	@echo "make chaos-slurm  the same for a job on a virtual SLURM cluster (root on Debian or Ubuntu)"
	@echo "make slurm-up    start a virtual SLURM cluster on this machine (root on Debian or Ubuntu) to try the launcher"
	@echo "make slurm-down  stop the virtual SLURM cluster"
	@echo "make bench-data  time video loading against decord, Pillow and torchvision, on one core"
	@echo "make bench-step  time real-size training updates against a plain implementation"
	@echo "make bench-launching  CPU time to launch an update of every row, against an earlier commit"
	@echo "make bench-gpu   time every row's training updates on this machine's GPU"
	@echo "make bench-saving  time checkpoints of the tiny and the base size on this machine's disk"
	@echo "make bench-checks  2,000 undisturbed updates with all checks of their numbers: false alarms and cost (10 minutes)"
	@echo "make bench-together  time students that share their teachers against one after the other"
	@echo "make bench-demo  the demo over five seeds, with a control (an hour)"
	@echo "make clean       remove .venv, the demo's runs and its data"

demo: .venv/installed
	$(BIN)/python launch/submit.py experiments/demo --local

test: .venv/installed-test  # one thread each, or the two would wait for each other's
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

test-fast: .venv/installed-test
	$(BIN)/pytest -m "not slow and not fullsize"

lint: typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: .venv/installed-test
	$(BIN)/mypy

chaos: .venv/installed-test
	$(BIN)/python -m tests.chaos.storm --faults $(or $(FAULTS),50) --group $(or $(GROUP),1)

chaos-slurm: .venv/installed-test
	$(BIN)/python -m tests.slurm.storm --faults $(or $(FAULTS),50)

slurm-up: .venv/installed-test
	@$(BIN)/python -m tests.slurm.lab up

slurm-down:
	@$(BIN)/python -m tests.slurm.lab down

bench-data: .venv/installed-test
	$(BIN)/python -m benchmarks.loading

bench-step: .venv/installed
	$(BIN)/python benchmarks/step.py

bench-launching: .venv/installed
	$(BIN)/python -m benchmarks.launching

bench-gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu

bench-saving: .venv/installed
	$(BIN)/python -m benchmarks.saving

bench-checks: .venv/installed-test
	$(BIN)/python -m benchmarks.checks

bench-together: .venv/installed-test
	$(BIN)/python -m benchmarks.together

bench-demo: .venv/installed
	$(BIN)/python -m benchmarks.demo

clean:
	rm -rf .venv runs data

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than Python 3.11; choose a newer one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .[test]
	@touch $@
