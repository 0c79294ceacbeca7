# `make quickstart` and `make test` are all that a fresh machine needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV ?= .venv
OUT ?= quickstart
BIN := $(VENV)/bin

# Without these, glibc returns the memory of each freed large tensor to the system. To get it back
# takes longer than an elementwise operation on the tensor.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

# Where it is set, as in many containers, each process compiles thousands of modules again, and to
# import llm-foundry takes 25 seconds instead of 15.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart test lint cpu-bench gpu-bench clean

install: $(VENV)/.installed

PYTHON_CHECK := import sys; v = sys.version.split()[0]; v.startswith(("3.11.", "3.12.")) or sys.exit( \
    f"{sys.executable} is Python {v}. m2_plugin needs 3.11 or 3.12: make PYTHON=python3.12 ...")

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/python data_prep/convert_text.py --out_root $(OUT)/mds --splits train val \
	    --local_files data_prep/quickstart/novels.jsonl.gz --val_fraction 0.05 \
	    --concat_tokens 128 --tokenizer data_prep/quickstart/tokenizer --verify
	test -e $(OUT)/run/huggingface/final/config.json || \
	    $(BIN)/composer train.py yamls/pretrain/m2-bert-quickstart.yaml variables.out=$(OUT)
	@echo "Loss curve: $(OUT)/run/loss_curve.png   transformers folder: $(OUT)/run/huggingface/final"

# The tests' tensors are small: threads would only wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 25

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Half an hour on a machine that does nothing else.
cpu-bench: install
	$(BIN)/python tests/benchmarks/bench_model.py --device cpu --threads 1
	$(BIN)/python tests/benchmarks/bench_serving.py
	$(BIN)/python tests/benchmarks/report.py

# This installs nothing. It needs a GPU, torch, Triton and transformers. SITE=FOLDER names a folder
# with llm-foundry and this package (`pip install --target`), for the training part alone.
gpu-bench: PYTHON = python3
gpu-bench:
	OUT=tests/benchmarks/results $(PYTHON) tests/benchmarks/gpu.py $(if $(SITE),--site $(SITE)); \
	    ended=$$?; \
	    PYTHONPATH=. $(PYTHON) tests/benchmarks/report.py; exit $$ended

clean:
	rm -rf $(VENV) $(OUT)
