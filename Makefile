# Needs Python 3.10 or newer, git and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit bench peers docs wheel clean
demo: $(VENV)/ready  ## train, quantize and verify three bundles on the embedded digits
	$(BIN)/edgecnn compress --recipe recipes/int8.yaml --out out/int8

test: lint types unit  ## everything CI checks

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

unit: $(VENV)/ready
	$(BIN)/pytest -n auto --dist loadfile -m "not slow and not shared and not gpu and not faults and not browser"

test-shared: $(VENV)/ready  ## needs the measuring data in ../shared
	$(BIN)/pytest -m shared

test-slow: $(VENV)/ready
	$(BIN)/pytest -m slow

# Pickles that run code, bombs, mutants, kills, full disks, hostile boards: SECURITY.md says what for. The short form is part of `unit`.
FAULTS_TESTS := $(addprefix tests/test_,faults.py mutants.py store_points.py sabotage.py untrusted.py commands.py network.py fuzz.py loaders.py properties.py sanity.py calibration_doubts.py store.py)
faults: $(VENV)/ready  ## faults in earnest: a quarter of an hour on two cores that do nothing else
	FAULTS=minutes $(BIN)/pytest -n 2 --dist worksteal $(FAULTS_TESTS)

faults-long: $(VENV)/ready  ## hours
	FAULTS=hours $(BIN)/pytest -n 2 --dist worksteal $(FAULTS_TESTS)

test-arm64: $(VENV)/ready  ## a bundle on an emulated arm64 Debian; as root, with debootstrap, qemu-user-static and binfmt-support
	$(BIN)/pytest -n0 -s tests/test_arm64.py

PEERS := $(patsubst benchmarks/peers/requirements/%.txt,benchmarks/peers/.envs/%/ready,$(wildcard benchmarks/peers/requirements/*.txt))
peers: $(VENV)/ready $(PEERS)  ## the other toolkits, each in an environment of its own: benchmarks/peers/README.md

benchmarks/peers/.envs/%/ready: benchmarks/peers/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement $<
	touch $@

bench: $(VENV)/ready  ## latency of the demo's bundles, and of MobileNetV2 where ../shared is; on a machine with nothing else to do
	$(BIN)/python benchmarks/bench_fixed.py

test-browser: $(VENV)/ready  ## the pages in Chromium, with axe-core, to out/screenshots; needs chromium and npm
	npm install --silent --no-save --no-package-lock playwright-core axe-core
	$(BIN)/pytest -n0 -m browser

docs: $(VENV)/ready  ## the documentation, to site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/ready
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out dist site
