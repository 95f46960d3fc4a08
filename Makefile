# Every target does its own set-up in .venv and is quick when that is there.
#
# To use it
#   make build   environment and extension   make clean     remove all that was made
#   make demo    train AMN on the bundled vectors with two losses and compare them (under 4 minutes after set-up)
# Before a commit
#   make test    the test suite              make lint      ruff, types (also make types)
#   make docs    the documentation as HTML, into build/docs
# More tests
#   make test-full   the suite on the full grid of shapes
#   make test-distributed   the loss over several processes
#   make fuzz        10,000 generated inputs compared with the reference, and thousands of wrong arguments and damaged files
#   make examples    run the examples of other people's training loops
#   make wheels      sdist and wheels into dist/, tested
# GPU kernels without a GPU
#   make test-triton   the Triton kernels on the CPU: values, addresses, races
#   make test-simt, test-simt-asan, test-simt-tsan   the CUDA kernels on the CPU: values, addresses, races (tests/simt)
#   make kernels-check   registers, spills, occupancy and bank conflicts of the compiled GPU kernels
#   make cost        bytes, operations and launches of the GPU kernels, counted
#   make ptx-proof   barriers and races in the PTX of the CUDA kernels: docs/ptx_proof.md (minutes)
#   make mutations   errors put into kernels and algorithm, and which of these notices: docs/mutations.md
# On a CUDA device
#   make test-gpu, bench-gpu   the tests that need one, and speed against what people run; with GPU_BACKENDS=triton
#                    without the CUDA C++ kernels, which need nvcc
# Measurements
#   make bench         speed and memory against eager PyTorch and torch.compile: docs/bench.md and the table in the README
#   make bench-peers   InfoNCE against other libraries, over rows, dimensions and dtypes: docs/bench.md (hours)
#   make bench-train   the loss's share of a training step: docs/bench.md and a line in the README
#   make bench-ring    peak memory of the loss over several processes
#   make profile       where the time of a step goes, part by part: docs/bench.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CASES ?= 10000
GPU_BACKENDS ?= cuda triton
TRITON := 3.8.0
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)

.PHONY: build clean demo test lint types docs test-full test-distributed fuzz examples wheels
.PHONY: test-triton test-simt test-simt-asan test-simt-tsan kernels-check cost ptx-proof mutations
.PHONY: bench bench-peers bench-train bench-ring profile test-gpu bench-gpu gpu-backends

demo: $(VENV)/.built
	$(BIN)/amn-kernels demo --overwrite

# Threads that wait without spinning: on a busy machine a spinning one keeps the one it waits for from running.
test test-full test-distributed test-triton test-simt fuzz examples: export OMP_WAIT_POLICY = passive
test: build
	$(BIN)/python -m pytest tests --ignore=tests/simt

test-full: build
	$(BIN)/python -m pytest tests --full

test-distributed: build
	$(BIN)/python -m pytest tests/test_distributed.py

test-triton: build
	$(BIN)/python -m ttsem.sanitize pytest tests/test_triton*.py tests/test_algorithm.py $(TRITON_ARGS)

test-simt: build
	$(BIN)/python -m pytest tests/simt -m "not asan and not tsan"

test-simt-asan: build
	$(BIN)/python -m pytest tests/simt -m asan

test-simt-tsan: build
	$(BIN)/python -m pytest tests/simt -m tsan

mutations: build
	$(BIN)/python -m tests.mutations $(MUTATION_ARGS)

fuzz: build
	cd tests && ../$(BIN)/python -m fuzz --cases $(CASES)

wheels:
	PYTHON=$(PYTHON) sh tests/wheels.sh

examples: build
	$(BIN)/python -m pytest tests/test_examples.py

docs: build
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a copy laid out as it is installed: here the reference is python_ref, there it is amn_kernels.reference.
types: $(VENV)/.development
	rm -rf build/types && mkdir -p build/types
	cp -r amn_kernels build/types && cp -r python_ref build/types/amn_kernels/reference
	$(BIN)/mypy

bench: build
	$(BIN)/python -m bench $(BENCH_ARGS)

profile: build
	$(BIN)/python -m bench.profile $(BENCH_ARGS)

bench-peers: build
	$(BIN)/python -m bench.grid $(BENCH_ARGS)

bench-ring: build
	$(BIN)/python -m bench.ring

bench-train: build
	$(BIN)/python -m bench.train_step $(BENCH_ARGS)

kernels-check: build
	$(BIN)/python -m tests.kernels_check $(CHECK_ARGS)

ptx-proof: build
	$(BIN)/python -m tests.ptx_proof

cost: build
	$(BIN)/python -m bench.cost

test-gpu: gpu-backends
	$(BIN)/python -m pytest tests/gpu tests/test_triton*.py tests/test_cuda_fake.py --full --require "$(GPU_BACKENDS)"

bench-gpu: gpu-backends
	$(BIN)/python -m bench.gpu $(BENCH_ARGS)

build: $(VENV)/.built $(VENV)/.development

# The build before may have been one without nvcc. Where there is none now it is an error that says so.
gpu-backends: build
	$(if $(filter cuda,$(GPU_BACKENDS)),$(BIN)/python -c 'from amn_kernels import ops; exit(not ops.has_cuda())' \
	  || AMN_CUDA=1 $(BIN)/pip install -q --no-build-isolation --no-deps -e .)

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# torch and numpy are needed before the build, which compiles against torch. The demo needs no more than this.
$(VENV)/.dependencies: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel torch numpy ninja
	$(BIN)/pip install -q -c constraints.txt $$($(call extras,group == "train"))
	touch $@

# Of open_clip, lightly and cut-cross-entropy single files are used; what they depend on would pull in torchvision. ttsem
# asks for Python 3.12, but runs on 3.11. A CUDA build of torch has brought its own Triton, which stays.
$(VENV)/.development: $(VENV)/.dependencies
	$(BIN)/pip install -q -c constraints.txt $$($(call extras,True))
	$(BIN)/pip install -q -c constraints.txt --no-deps open_clip_torch lightly cut-cross-entropy
	$(BIN)/pip install -q -c constraints.txt --no-deps --ignore-requires-python ttsem
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install -q triton==$(TRITON)
	touch $@

# What pyproject.toml asks for in its extras, without the versions, which constraints.txt has.
extras = $(BIN)/python -c 'import tomllib; \
  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*[item for group, items in extras.items() if $(1) for item in items])' | sed "s/>=[^ ]*//g"

clean:
	rm -rf $(VENV) build dist *.egg-info runs amn_kernels/*.so amn_kernels/_C.torch
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
