# make demo: from a clean checkout to trained models and a report. make test: the tests.
# Both first create a virtual environment in .venv and install what they need; PYTHON chooses the
# interpreter, TORCH the version of torch, such as TORCH=torch==2.10.*

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_FLAGS ?= -n 2 --dist worksteal
TORCH ?= torch

# Without a GPU the CUDA part could not run and takes minutes to compile, so it is left out unless
# MCIBI_FAST_CUDA asks for it.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export MCIBI_FAST_CUDA ?= 0
endif

.PHONY: demo test check format clean

demo: $(VENV)/.installed
	$(BIN)/mcibi-fast demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

# The inner loop: what `slow` marks is left out. CONTRIBUTING.md says what that is.
.PHONY: test-fast
test-fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

# Damaged files of every kind, to all that reads files; `make test` has a few seconds of it.
FUZZ_SECONDS ?= 600
.PHONY: fuzz
fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.security.fuzz --seconds $(FUZZ_SECONDS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

# The site, from docs/ and the docstrings, into site/; it needs no network, and a warning is an error.
.PHONY: docs
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What only a GPU can show: every kernel's results and times.
.PHONY: gpu
gpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_check

# Wheels for every Python and every torch from 2.10 on, into wheelhouse/cpu/ and, where nvcc is,
# wheelhouse/cuda/; buildtools/wheels.py says more.
.PHONY: wheels
wheels: $(VENV)/.installed-dev
	$(BIN)/python -m buildtools.wheels

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf build site wheelhouse $(VENV)/.installed $(VENV)/.installed-dev mcibi_fast/*.so mcibi_fast/_build_record.json

# The sources are compiled against the torch of the environment, so it comes first.
SOURCES := setup.py pyproject.toml mcibi_fast/_schemas.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" torchvision setuptools ninja
	$(BIN)/python -m pip install --no-build-isolation -e '.[all]'
	$(BIN)/mcibi-fast info  # pip hides the build's report on its backends
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed tests/compat/mmseg_requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/compat/mmseg_requirements.txt
	touch $@
