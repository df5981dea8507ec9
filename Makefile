# Every target sets itself up: a fresh machine needs python3 (3.10 or newer), make and a C++ compiler.
PYTHON ?= python3
PYTEST_ARGS ?= -q -n 2
BIN := .venv/bin
INSTALLED := .venv/installed.stamp
BUILD_INPUTS := setup.py pyproject.toml MANIFEST.in constraints.txt \
	$(shell find build_backend csrc -type f -not -name '*.pyc' -not -name '.*')
CXX_FILES = find csrc tests/hopper_model tests/cpu_driver -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp'

.PHONY: install test demo lint aot gpu
install: $(INSTALLED)

# torch comes first and pinned: left to the resolver, another release of it may be several gigabytes more.
# Where torch brings a Triton of its own, that one stays.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -q $$(grep '^triton==' constraints.txt)
	$(BIN)/python -m pip install -q -e ".[test,bench,transformers,lint]"
	touch $@

# A file's tests stay in one worker, which builds what they share once.
test: install
	$(BIN)/python -m pytest --dist loadfile $(PYTEST_ARGS)

demo: install
	$(BIN)/python examples/deepseek_v3_layer.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_FILES) | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

# What other Tritons make of the kernels: `make aot TRITON=3.6.0 AOT_ARGS="--op mla_decode --arch 90"`. That release is
# installed into a folder of its own.
TRITON ?= $(shell sed -n 's/^triton==//p' constraints.txt)
aot: install
	test -d build/triton-$(TRITON) || $(BIN)/python -m pip install -q --no-deps --target build/triton-$(TRITON) \
		triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python tests/aot.py $(AOT_ARGS)

# Uses the python on PATH: a machine with a GPU has its own torch, and may have no network.
gpu:
	scripts/gpu.sh
