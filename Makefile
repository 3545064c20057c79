# Two commands do everything on a machine that has Python 3.11 or later, and make:
#   make demo   set up, then convert, inspect, run, prove and quantize the bundled tiny LLaMA
#   make test   set up, then run all tests and checks
# One more needs Debian or its kin:
#   make test-arm64   set up an emulated arm64, then compare what the kernels write there with what they write here

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
MODEL := build/tiny-llama.gguf
SMALL := build/tiny-llama-q4_k_m.gguf

.PHONY: demo test test-arm64 docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@mkdir -p build
	@echo "== 1. Convert a Meta checkpoint (two shards, bfloat16) to an aligned GGUF file"
	$(BIN)/llamatools convert fixtures/tiny-llama $(MODEL) --context 1024 --name "Tiny LLaMA" --force
	@echo "== 2. Look at it"
	$(BIN)/llamatools inspect $(MODEL)
	@echo "== 3. Run it: it recites the poem it was trained on"
	$(BIN)/llamatools run $(MODEL) --max-tokens 1000
	@echo "== 4. Prove that it computes what the original checkpoint computes"
	$(BIN)/llamatools run $(MODEL) --against fixtures/tiny-llama
	@echo "== 5. Quantize it to a third of its size; it still knows the poem"
	$(BIN)/llamatools quantize $(MODEL) $(SMALL) q4_k_m --force
	$(BIN)/llamatools run $(SMALL) --max-tokens 200

test: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

test-arm64: $(VENV)/installed-for-tests
	tests/arm64/setup.sh build/arm64 $(BIN)/python
	@echo "== The vector layer on arm64, against numpy"
	PYTHONPATH=. build/arm64/python -m pytest -q --noconftest -p no:cacheprovider tests/test_simd*.py
	@echo "== Every encoder and decoder, arm64 against this machine"
	PYTHONPATH=. $(BIN)/python tests/arm64/compare.py build/arm64/python

docs: $(VENV)/installed
	$(BIN)/python docs/command_line.py

bench: $(VENV)/installed-for-tests
	@ls tests/bench/*.py
	@echo "Run one of these by hand with $(BIN)/python; each says at its top what it measures."

clean:
	rm -rf build $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.11"; exit 1; }
	@echo "== Setting up $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "== Installing llamatools, and torch to prove the result with"
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/installed-for-tests: pyproject.toml $(VENV)/installed
	@echo "== Installing what the tests compare with"
	$(BIN)/pip install --quiet --group dev
	@touch $@
