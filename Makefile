# Two commands on a fresh machine with Python >= 3.10 and a C++ compiler: `make train`, `make test`. `make help` lists all.
#
# Everything is installed into $(VENV). It is reused while its stamps are fresh: they hold a hash of what was
# installed from, so a changed pyproject.toml installs again, and a changed C++ file compiles again, and only then.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv venv-test venv-bench train test bench gpu lint format sanitize clean

VENV ?= .venv
RANKS ?= 2
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
BUILD_TOOLS := 'setuptools>=77' wheel 'pybind11>=2.12'

# The first of these that is new enough; `make PYTHON=...` overrides it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)

comma := ,

# The environment's stamp: what pip reads. The core's stamp: what the compiler reads, how it was asked to, and which
# compilers there are.
HASH := sha256sum 2>/dev/null || shasum -a 256
STAMP_ENV := (cat pyproject.toml constraints.txt Makefile; $(PY) -VV) | ($(HASH))
STAMP_CORE := (cat setup.py pyproject.toml; find csrc -type f | LC_ALL=C sort | xargs cat; $(PY) -VV; \
	echo "$${DISTLIB_NATIVE-} $${DISTLIB_CUDA-} $${DISTLIB_CUDA_ARCH-} $${CXX-} $${NVCC-} $${CUDA_HOME-}"; \
	command -v c++ g++ clang++ nvcc || true) | ($(HASH))

help:
	@echo "make train     install, then train a language model on $(RANKS) ranks (RANKS=n, ARGS='...' for the script)"
	@echo "make test      install, then run the tests (ARGS='tests/test_ranks.py -k values' for some)"
	@echo "make bench     install the peers to compare with, then run every benchmark"
	@echo "make gpu       on a machine with a GPU: build, test and measure for it; no network (ARGS='--record', see docs/gpu.md)"
	@echo "make lint      ruff, mypy on the package, clang-format on the C++ sources, shellcheck, hadolint"
	@echo "make format    let ruff and clang-format put right what they can"
	@echo "make sanitize  C++ tests under AddressSanitizer + UBSan, and under ThreadSanitizer"
	@echo "make clean     remove what was built, not $(VENV)"

# ---- installing -----------------------------------------------------------------------------------------------

# torch: one that is installed and fits the constraint is kept (see the venv below). Without an NVIDIA device a CPU
# build is tried first, should pip's own configuration offer one: it is ten times smaller. No index is named here.
define INSTALL_TORCH
$(PY) -c 'from importlib.metadata import version; version("torch")' 2>/dev/null || { \
	want=$$(sed -n 's/^torch==//p' constraints.txt); \
	if [ ! -e /dev/nvidiactl ] && $(PIP) install -q "torch==$$want+cpu" 2>/dev/null; then :; \
	else $(PIP) install -c constraints.txt torch; fi; }
endef

# Some Linux distributions ship Python without ensurepip; then pip comes from the system's pip.
# A torch of the wanted version outside the environment (a deep-learning image) is seen through it, and reused.
$(PY):
	@[ -n "$(PYTHON)" ] || { echo "error: no Python >= 3.10 found on PATH; install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@see=$$($(PYTHON) -c 'from importlib.metadata import version as v; import sys; \
		want = [l.split("==")[1].strip() for l in open("constraints.txt") if l.startswith("torch==")][0]; \
		own = sys.prefix == sys.base_prefix and v("torch").split("+")[0] == want; \
		print("--system-site-packages" if own else "")' 2>/dev/null || true); \
	$(PYTHON) -m venv $$see $(VENV) || \
	{ $(PYTHON) -m venv --clear --without-pip $$see $(VENV) && $(PYTHON) -m pip --python $(VENV) install -q pip; } || \
	{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

# $(call REFRESH,stamp,hash command,what to do): does it unless the stamp says that it was done.
REFRESH = new=$$( $(2) ); [ "$$(cat $(VENV)/$(1) 2>/dev/null)" = "$$new" ] || { $(3); echo "$$new" > $(VENV)/$(1); }

venv: $(PY)
	@$(call REFRESH,stamp-env,$(STAMP_ENV),$(INSTALL_TORCH); $(PIP) install -q $(BUILD_TOOLS); \
		$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[plan]'; rm -f $(VENV)/stamp-core)
	@[ -e distlib/_build_info.py ] || rm -f $(VENV)/stamp-core
	@$(call REFRESH,stamp-core,$(STAMP_CORE),$(PY) setup.py -q build_ext --inplace)

venv-test: venv
	@$(call REFRESH,stamp-test,$(STAMP_ENV),$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test$(comma)mpi]')

venv-bench: venv
	@$(call REFRESH,stamp-bench,$(STAMP_ENV),$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[bench]')

# ---- running --------------------------------------------------------------------------------------------------

train: venv
	$(PY) -m torch.distributed.run --nproc-per-node $(RANKS) examples/train_lm.py $(ARGS)

# Tests that measure time or memory, marked `alone`, go before the others. Of those, two files are tested at a time: on two
# cores three took a tenth longer, for their ranks take turns.
test: venv-test
ifeq ($(strip $(ARGS)),)
	$(PY) tests/compile_stand_ins.py
	@failed=; \
	$(PY) -m pytest -m alone $$(grep -l 'pytest\.mark\.alone' tests/test_*.py) || failed=1; \
	$(PY) -m pytest -m 'not alone' --numprocesses 2 --dist loadfile --no-loadscope-reorder || failed=1; \
	[ -z "$$failed" ]
else
	$(PY) -m pytest $(ARGS)
endif

bench: venv-bench
	$(PY) benchmarks/run_all.py $(ARGS)

# With the torch that is there, and without network: nothing is installed. $(PYTHON), or the environment made above where
# that one has no torch.
gpu:
	@py="$(PYTHON)"; "$$py" -c 'from importlib.metadata import version; version("torch")' 2>/dev/null || \
		{ [ ! -x $(PY) ] || py=$(PY); }; \
	[ -n "$$py" ] || { echo "error: no Python >= 3.10 found on PATH; say make gpu PYTHON=/path/to/python3" >&2; exit 1; }; \
	exec "$$py" benchmarks/gpu_all.py $(ARGS)

CPP := $(shell find csrc tests/cpp tests/cuda_on_cpu tests/fake_device -name '*.[ch]pp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' \
	-o -name '*.cuh' 2>/dev/null | LC_ALL=C sort)

lint: venv-test
	@failed=; \
	$(VENV)/bin/ruff check . || failed+=" ruff"; \
	$(VENV)/bin/mypy || failed+=" mypy"; \
	[ -z "$(CPP)" ] || $(VENV)/bin/clang-format --dry-run --Werror $(CPP) || failed+=" clang-format"; \
	$(VENV)/bin/shellcheck launch/*.sh .ci/run || failed+=" shellcheck"; \
	$(VENV)/bin/hadolint Dockerfile.cuda || failed+=" hadolint"; \
	[ -z "$$failed" ] || { echo "lint failed:$$failed" >&2; exit 1; }

format: venv-test
	$(VENV)/bin/ruff check --fix .
	$(if $(CPP),$(VENV)/bin/clang-format -i $(CPP))

# ---- sanitizers -----------------------------------------------------------------------------------------------

# tests/cpp/NAME_test.cpp has a main() that returns 0 when all is well. Each is linked with all of csrc but the
# Python binding (the files that include pybind11) and run under AddressSanitizer and UBSan. Those that start
# threads are run again under ThreadSanitizer, which cannot be combined with them.
CXX ?= c++
SANITIZE_SOURCES := $(shell grep -L pybind11 csrc/core/*.cpp csrc/cpu/*.cpp 2>/dev/null)
TESTS_asan := $(wildcard tests/cpp/*_test.cpp)
TESTS_tsan := $(if $(TESTS_asan),$(shell grep -lE 'std::thread|std::async|pthread_create' $(TESTS_asan)))
SANITIZE_FLAGS := -O1 -g -std=c++17 -ffp-contract=off -fno-omit-frame-pointer -pthread -Wall -Wextra -Icsrc -Icsrc/cpu
FLAGS_asan := -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_tsan := -fsanitize=thread
HEADERS := $(shell find csrc tests/cpp -name '*.hpp' -o -name '*.inl' 2>/dev/null)
# Kernels with much address randomisation place mappings where older sanitizers do not expect them.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

define SANITIZE
build/$(1)/%.o: %.cpp $(HEADERS)
	@mkdir -p $$(@D)
	$(CXX) $(SANITIZE_FLAGS) $(FLAGS_$(1)) -c $$< -o $$@

build/$(1)/%_test: build/$(1)/tests/cpp/%_test.o $(SANITIZE_SOURCES:%.cpp=build/$(1)/%.o)
	$(CXX) $(FLAGS_$(1)) -pthread $$^ -o $$@

.PHONY: sanitize-$(1)
sanitize-$(1): $(TESTS_$(1):tests/cpp/%.cpp=build/$(1)/%)
	@for t in $$^; do echo "$$$$t"; $(FIXED_ADDRESSES) $$$$t; done; echo "$(1): $$(words $$^) tests passed"
endef
$(eval $(call SANITIZE,asan))
$(eval $(call SANITIZE,tsan))
.PRECIOUS: build/asan/%.o build/tsan/%.o

sanitize:
	@[ -n "$(TESTS_asan)" ] || { echo "error: tests/cpp holds no *_test.cpp" >&2; exit 1; }
	@$(MAKE) --no-print-directory sanitize-asan sanitize-tsan

clean:
	rm -rf build dist *.egg-info distlib/_native*.so distlib/_cuda.so distlib/_build_info.py
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find distlib tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
