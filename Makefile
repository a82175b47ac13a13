# `make demo` and `make test` are all that a newcomer needs; CI runs the same targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test soak test-slurm docs lint format clean

demo: $(VENV)/.installed
	$(BIN)/batchvlm run
	@echo
	@echo "Next, with the same images:"
	@echo "  $(BIN)/batchvlm run task=vqa          each image's own question"
	@echo "  $(BIN)/batchvlm run task=extract      JSON by a schema"
	@echo "Then with your own Parquet file and a model of the Hub:"
	@echo "  $(BIN)/batchvlm run data=parquet data.path=IN.parquet model=hub \\"
	@echo "      model.path=Qwen/Qwen2.5-VL-3B-Instruct output.dir=OUT"

# A test's process for each core: with a compute thread each, nothing waits for a core that is not there.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(VENV)/.installed-test
	$(PYTEST)

# Long jobs, real kills, walks over every fault point, the model families used less, and what docs/ tells people to
# type. More kills: make soak KILLS=500
KILLS ?= 40
soak: $(VENV)/.installed-test
	$(PYTEST) -m 'soak or kill or docs' --kills $(KILLS)

# The pages of docs/, in build/docs; a dead link is an error.
docs: $(VENV)/.installed-test
	$(BIN)/python docs/settings_page.py
	$(BIN)/sphinx-build -W -q docs build/docs
	@echo "build/docs/index.html"

# Jobs on a real Slurm of four nodes on this machine. As root on Debian; else skipped with the reason.
test-slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slurm

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV); torch is large, this may take some minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(PIP) --editable '.[test,lint]'
	@touch $@
