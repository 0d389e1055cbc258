# Needs Python 3.10 or newer, git and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit wheel clean
demo: $(VENV)/ready  ## train, quantize and verify three bundles on the embedded digits
	$(BIN)/edgecnn compress --recipe recipes/int8.yaml --out out/int8

test: lint types unit  ## everything CI checks

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

unit: $(VENV)/ready
	$(BIN)/pytest -n auto --dist loadfile -m "not slow and not shared and not gpu"

test-shared: $(VENV)/ready  ## needs the measuring data in ../shared
	$(BIN)/pytest -m shared

test-slow: $(VENV)/ready
	$(BIN)/pytest -m slow

test-arm64: $(VENV)/ready  ## a bundle on an emulated arm64 Debian; as root, with debootstrap, qemu-user-static and binfmt-support
	$(BIN)/pytest -n0 -s tests/test_arm64.py

wheel: $(VENV)/ready
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out dist
