# make install   .venv with everything, pinned by constraints.txt
# make demo      export, verify, time and try the demonstration checkpoint
# make test      linters, types and tests: minutes
# make test-fast   what needs no export and no process of its own: for each save of a file
# make test-slow   recipes, whole exports and benches of faults, the README's commands, another environment
# make test-serving what is behind NVIDIA's tritonserver, which pip installs into an environment of its own: minutes
# make test-older  what computes in int8, as a processor with AVX2 and without VNNI does
# make test-oldest export and what a device does, with the oldest releases that pyproject.toml admits

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := out/demo

.PHONY: install demo test test-fast test-slow test-serving test-older test-oldest lint digits scenes picture clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python %d.%d; expected 3.10 or newer: make PYTHON=python3.x" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/dmformer export --format onnx --format openvino --format torch --output $(DEMO)
	$(BIN)/dmformer verify $(DEMO)
	$(BIN)/dmformer bench $(DEMO)
	$(BIN)/dmformer predict $(DEMO) dmformer/assets/digits/7.png --top-k 3

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m 'not slow'

test-fast: install
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m 'not slow and not medium'

test-slow: install
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m 'slow and not serving'

# One worker: the server and its clients share the cores.
test-serving: install
	$(BIN)/pytest -m serving

# oneDNN obeys the variable, and with it OpenVINO.
INT8_TESTS := -k 'not emulated' tests/test_processors.py tests/test_saturation.py tests/test_int8.py tests/test_precision_export.py tests/test_precision_parity.py
test-older: install
	ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest --numprocesses 2 --dist worksteal $(INT8_TESTS)

test-oldest: install
	$(BIN)/dmformer export --format onnx --format openvino --output $(DEMO)
	$(BIN)/python benchmarks/oldest.py $(DEMO)

# Remakes the demonstration checkpoint and its images: about two minutes on two cores.
digits: install
	$(BIN)/python -m dmformer.train.datasets digits --images out/digits --samples dmformer/assets
	$(BIN)/dmformer train --recipe digits --data out/digits --output out/digits-run
	cp out/digits-run/model.safetensors dmformer/assets/dmformer_nano_digits.safetensors

# Remakes the segmentation checkpoint and its sample images: minutes on two cores.
scenes: install
	$(BIN)/python -m dmformer.train.datasets scenes --images out/scenes
	$(BIN)/dmformer train --recipe scenes --data out/scenes --output out/scenes-run \
		--weights dmformer/assets/dmformer_nano_digits.safetensors
	cp out/scenes-run/model.safetensors dmformer/assets/dmformer_nano_fpn_scenes.safetensors
	$(BIN)/python -m dmformer.train.datasets scenes --images dmformer/assets/scenes --training 32 --validation 8

picture: install
	$(BIN)/python docs/picture.py

clean:
	rm -rf $(VENV) out
