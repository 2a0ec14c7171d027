# Everything a person or CI types. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
PROTOS := $(shell find protos/autoglm -name '*.proto' | sort)
THIRD_PARTY := $(shell find protos/third_party -name '*.proto' 2>/dev/null | sort)

.DEFAULT_GOAL := help
.PHONY: help proto proto-check

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

define generate
	$(BIN)/python -m grpc_tools.protoc -Iprotos -Iautoglm/third_party=protos/third_party \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) \
	  $(PROTOS:protos/%=%) $(THIRD_PARTY:protos/third_party/%=autoglm/third_party/%)
	find $(1)/autoglm -type d -exec sh -c 'for d; do [ -e "$$d/__init__.py" ] || : > "$$d/__init__.py"; done' _ {} +
endef

proto: ## regenerate the gRPC stubs from protos/
	$(call generate,sdk)
