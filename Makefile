# Everything a person or CI types. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
MESH := $(BIN)/python -m services.mesh
CLOUDS := $(BIN)/python -m services.mesh.clouds
# One thread per process: the machine is shared by many small processes, not by one large one.
TEST_ENV := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PROTOS := $(shell find protos/autoglm -name '*.proto' | sort)
KERNELS := $(shell find kernels -path kernels/build -prune -o -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.py*' -o -name CMakeLists.txt -o -name pyproject.toml \) -print)
READY := $(VENV)/.run-stamp $(VENV)/.kernels-stamp
READY_DEV := $(VENV)/.dev-stamp $(VENV)/.kernels-stamp
THIRD_PARTY := $(shell find protos/third_party -name '*.proto' | sort)

.DEFAULT_GOAL := help
# What `make run` and `make smoke` may be given besides; each becomes the setting of that name.
ifneq ($(MODEL),)
run smoke: export AUTOGLM_MODEL_DIR := $(MODEL)
endif
ifneq ($(MODEL_NAME),)
run smoke: export AUTOGLM_MODEL_NAME := $(MODEL_NAME)
endif
ifneq ($(PRECISION),)
run smoke: export AUTOGLM_PRECISION := $(PRECISION)
endif
ifneq ($(THREADS),)
run smoke: export AUTOGLM_THREADS := $(THREADS)
endif

.PHONY: help run smoke stop status clouds clouds-smoke clouds-stop test test-arm fuzz check format proto proto-into proto-check proto-release bench bench-engine bench-quality bench-peers model packages clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

run: $(READY) ## start the mesh, ask it something, show the trace (MODEL=dir, .gguf or sha256:… MODEL_NAME= PRECISION= THREADS=)
	@$(MESH) run

smoke: $(READY) ## the same without a terminal: start, check one answer, stop; exits 0 or not
	@$(MESH) smoke

stop: ## stop the mesh that `make run` started
	@if [ -x $(BIN)/python ]; then $(MESH) stop; else echo "nothing is installed, so nothing runs"; fi

clouds: $(READY) ## three clouds on this machine: a whole mesh each, failover, one token stream (as root: in network namespaces)
	@$(CLOUDS) run

clouds-smoke: $(READY) ## the same without a terminal: start, check, hurt, check, stop; exits 0 or not
	@$(CLOUDS) smoke

clouds-stop: ## stop what `make clouds` started
	@if [ -x $(BIN)/python ]; then $(CLOUDS) stop; else echo "nothing is installed, so nothing runs"; fi

status: $(READY) ## what runs, on which ports, under which policy
	@$(MESH) status

test: $(READY_DEV) ## every test: real processes, real Envoy
	$(TEST_ENV) $(BIN)/python -m pytest

SELFTEST := .cache/selftest
test-arm: ## the kernels compiled for ARM, under qemu: the same bits as on x86 (kernels/selftest/expected.txt)
	@command -v aarch64-linux-gnu-g++ >/dev/null || { echo "test-arm: skipped, there is no aarch64-linux-gnu-g++ (make packages)"; exit 0; }; \
	command -v qemu-aarch64 >/dev/null || { echo "test-arm: skipped, there is no qemu-aarch64 (make packages)"; exit 0; }; \
	set -e; export PATH="$(CURDIR)/$(BIN):$$PATH"; mkdir -p $(SELFTEST); \
	cmake -G Ninja -S kernels -B $(SELFTEST)/arm -DAUTOGLM_SELFTEST=ON -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/kernels/cmake/aarch64.cmake >/dev/null; \
	cmake --build $(SELFTEST)/arm >/dev/null; \
	for cpu in max cortex-a72; do \
	  qemu-aarch64 -cpu $$cpu $(SELFTEST)/arm/autoglm-selftest --isa neon --quick >$(SELFTEST)/$$cpu.txt; \
	  diff kernels/selftest/expected.txt $(SELFTEST)/$$cpu.txt; \
	  echo "test-arm: $$cpu gives the bits of x86"; \
	done

fuzz: $(READY_DEV) ## open damaged model files for ten minutes (MINUTES=…): nothing but typed errors may come out
	$(TEST_ENV) $(BIN)/python -m tests.long.fuzz_checkpoints --minutes $(or $(MINUTES),10)

check: $(READY_DEV) proto-check ## format, lint, types, import contracts, protos, manifests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(MESH) check

format: $(READY_DEV) ## rewrite the Python files as the formatter wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(READY_DEV) ## regenerate the gRPC stubs from protos/
	@$(MAKE) --no-print-directory proto-into INTO=sdk

proto-into:
	@$(BIN)/python -m grpc_tools.protoc -Iprotos -Iautoglm/third_party=protos/third_party \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(INTO) --grpc_python_out=$(INTO) --mypy_out=quiet:$(INTO) --mypy_grpc_out=quiet:$(INTO) \
	  $(PROTOS:protos/%=%) $(THIRD_PARTY:protos/third_party/%=autoglm/third_party/%)
	@find $(INTO)/autoglm -type d -name '[a-z]*' -exec sh -c '[ -e "$$1/__init__.py" ] || : > "$$1/__init__.py"' _ {} \;

proto-check: $(READY_DEV) ## lint the protos, compare them with the last release, and the stubs with the protos
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/released.binpb
	@rm -rf .cache/proto && mkdir -p .cache/proto
	@$(MAKE) --no-print-directory proto-into INTO=.cache/proto
	@cd .cache/proto && find autoglm -name '*_pb2*' | while read -r file; do \
	  cmp -s "$$file" "$(CURDIR)/sdk/$$file" || { echo "sdk/$$file is not what protos/ give: run make proto"; exit 1; }; \
	done

proto-release: $(READY_DEV) ## declare the protos as they are to be the release that later changes must not break
	$(BIN)/buf build -o protos/released.binpb

bench: $(READY_DEV) ## measure the claims and write benchmarks/results
	$(TEST_ENV) $(BIN)/python -m benchmarks.mesh
	$(TEST_ENV) $(BIN)/python -m benchmarks.token_limit

bench-engine: $(READY_DEV) ## the engine under mixed load, its memory, the mesh around it (ARGS="mixed-load --quick")
	$(BIN)/python -m benchmarks.engine $(ARGS)

bench-quality: $(READY_DEV) ## what each number format costs glm-tiny in quality on held-out text
	$(TEST_ENV) $(BIN)/python -m benchmarks.quality

bench-peers: $(READY_DEV) ## our engine beside llama.cpp, OpenVINO and ONNX Runtime (first time: an hour and 20 GB of disk; ARGS=--help)
	$(PIP) install --quiet --constraint constraints.txt --group bench
	$(BIN)/python -m benchmarks.peers $(ARGS)

model: $(READY_DEV) ## train glm-tiny again from the standard library (up to two hours on two cores; resumes)
	$(BIN)/python -m services.trainer.pretrain

packages: ## system packages that tests use when they are there (Debian; needs root)
	command -v redis-server >/dev/null || { apt-get update -qq && apt-get install -y -qq redis-server; }
	{ command -v prometheus && command -v promtool; } >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus; }
	{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || { apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user; }

clean: stop clouds-stop ## remove what was installed and generated here
	rm -rf $(VENV) .cache .run

$(BIN)/pip:
	@echo "creating $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'

$(VENV)/.run-stamp: pyproject.toml constraints.txt sdk/pyproject.toml | $(BIN)/pip
	@echo "installing what the mesh needs (about 150 MB; once)"
	$(PIP) install --constraint constraints.txt --group run --editable sdk
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml constraints.txt sdk/pyproject.toml | $(BIN)/pip
	@echo "installing what tests and training need (about 1 GB with torch; once)"
	$(PIP) install --constraint constraints.txt --group dev --editable sdk
	@touch $@ $(VENV)/.run-stamp

$(VENV)/.kernels-stamp: $(KERNELS) | $(BIN)/pip
	@echo "compiling the kernels (about a minute; once)"
	$(PIP) install --quiet --no-deps ./kernels
	@touch $@
