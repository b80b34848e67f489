PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUNS := runs
ARM := aarch64-linux-gnu
HAS_COMPILER := echo 'int main() {}' | $(CXX) -fopenmp -x c++ - -o /dev/null 2>/dev/null
# what `make test` must have tested: it fails if tests of these were skipped
MUST_RUN ?= onnx $(if $(filter Linux,$(shell uname)),triton) $(shell if $(HAS_COMPILER); then echo native; fi)
NATIVE := $(wildcard src/native/*.cpp src/native/*.h src/native/CMakeLists.txt)

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-arm test-gpu bench-gpu bench-gpu-short lint format bench docs reliability clean

help:
	@echo "make demo   train dense and two-phase side by side on real data and write a report"
	@echo "make test   lint, types, layer rules, tests, doctests, README snippets"
	@echo "make quick  the same without types and slow tests, in two minutes"
	@echo "make lint   the first three of these"
	@echo "make reliability  try every fault many times (half an hour), write docs/reliability.md"
	@echo "make test-arm  check the C++ kernels as compiled for ARM, under an emulator"
	@echo "make docs   build the site into build/site, every link checked"
	@echo "make bench  measure speed and memory against dense (hours), write benchmarks/results/ and docs/benchmarks.md"
	@echo "make test-gpu, make bench-gpu  tests and benchmarks on an NVIDIA GPU, in a venv whose torch has CUDA"
	@echo "make bench-gpu-short  both in eight minutes; a second call measures with tuned launches"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# two stamps, so that the demo does not wait for the tools of the tests
$(VENV)/.experiments: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "installing kronblocks and its experiments (PyTorch is large: a few minutes the first time)"
	$(INSTALL) torch setuptools scikit-build-core cmake ninja
	$(INSTALL) --no-build-isolation --editable '.[experiments]'
	@touch $@

# where a compiler with OpenMP is at work, kernels that do not compile are an error, not a reason to skip their tests
$(VENV)/.dev: $(VENV)/.experiments
	@echo "installing the tools of the tests"
	@if $(HAS_COMPILER); then export KRONBLOCKS_REQUIRE_NATIVE=1; fi; \
		$(INSTALL) --no-build-isolation --editable '.[experiments,dev]'
	@touch $@

demo: $(VENV)/.experiments
	$(BIN)/kronblocks compare --out $(RUNS)/demo --data mnist5k --model mlp --widths 1024 1024 \
		--methods dense two-phase --seeds 0 1 --block-size 16 --sparsity 0.9 --epochs 15 --batch-size 128 --resume

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

quick: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

test: lint
	OMP_NUM_THREADS=1 KRONBLOCKS_MUST_RUN="$(strip $(MUST_RUN))" $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# what every test run builds too, so a link that leads nowhere is found at once
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "docs: build/site/index.html"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(VENV)/.dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu

# the kernels as an ARM machine compiles them, emulated, against plain loops (Debian: g++-aarch64-linux-gnu, qemu-user)
test-arm:
	@mkdir -p build
	$(ARM)-g++ -std=gnu++17 -O2 -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra -Wno-psabi -DKRONBLOCKS_ISA=baseline \
		-Isrc/native src/native/kernels.cpp tests/native/check_kernels.cpp -o build/check-kernels-arm
	$(ARM)-g++ -std=gnu++17 -fopenmp -fsyntax-only -Wall -Wextra src/native/dispatch.cpp src/native/operators.cpp
	qemu-aarch64 -L /usr/$(ARM) build/check-kernels-arm

bench-gpu: $(VENV)/.experiments
	for dtype in fp32 tf32 bf16; do \
		$(BIN)/kronblocks bench step --device cuda --authors --compiled --dtype $$dtype && \
		$(BIN)/kronblocks bench step --device cuda --authors --compiled --dtype $$dtype --rows 256 --graphs --no-memory && \
		$(BIN)/kronblocks bench ops --device cuda --large --compiled --dtype $$dtype || exit 1; \
	done
	for model in vit-tiny vit-base; do \
		$(BIN)/kronblocks bench model --device cuda --model $$model --batch-size 128 --block-size 64 --compiled --dtype bf16 && \
		$(BIN)/kronblocks bench model --device cuda --model $$model --batch-size 128 --block-size 32 --sparsity 0.8 --label 32x32 --dtype bf16 || exit 1; \
	done
	$(BIN)/kronblocks bench tables

SHORT := benchmarks/results/bench-short-cuda

# everything that counts on a GPU at one shape each; once that is there, the same with tuned sizes of launches
bench-gpu-short: $(VENV)/.dev
	if [ -f $(SHORT).json ]; then tune=--tune; fi; $(BIN)/kronblocks bench short --device cuda $$tune; \
		status=$$?; $(BIN)/kronblocks bench tables && exit $$status

reliability: $(VENV)/.dev
	KRONBLOCKS_RELIABILITY=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/reliability
	$(BIN)/python -m kronblocks_lab.pages

bench: $(VENV)/.experiments
	$(BIN)/kronblocks bench ops
	$(BIN)/kronblocks bench step
	$(BIN)/kronblocks bench infer
	$(BIN)/kronblocks bench precision
	$(BIN)/kronblocks bench conv
	$(BIN)/kronblocks bench account
	$(BIN)/kronblocks bench deploy
	$(BIN)/kronblocks bench train
	$(BIN)/kronblocks bench model
	$(BIN)/kronblocks bench tables

clean:
	rm -rf $(VENV) $(RUNS) build dist .pytest_cache .ruff_cache .hypothesis
