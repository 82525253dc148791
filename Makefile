# make demo   install, and scan the example that the repository ships
# make test   install what tests need, and run them all
# make lint   style and formatting
# make emulate  every kernel of the scan's test cases, run on the CPU (minutes; needs g++)
# make gpu    GPU tests and benchmarks on this machine's GPU; writes benchmarks/records/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test emulate lint format gpu sanitize clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[lint]'
	touch $@

demo: $(VENV)/installed
	mkdir -p out
	$(BIN)/mambacupy scan examples/ice_core --discretization zoh --output out/smooth.npy --force
	@echo "out/smooth.npy holds the record smoothed over the time constants of examples/ice_core: one channel each."

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto

emulate: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/test_emulated_kernels.py --emulate-all

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The two below take the Python that has CuPy for this machine; nothing is installed.
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

sanitize:
	PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m benchmarks.sanitize
	PYTHONPATH=. compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m benchmarks.sanitize
	PYTHONPATH=. compute-sanitizer --tool initcheck --error-exitcode 1 $(PYTHON) -m benchmarks.sanitize without-library

clean:
	rm -rf $(VENV) out build dist *.egg-info
