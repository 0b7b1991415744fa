# Every verb works on a fresh clone: environment and build come first, by themselves.
PYTHON ?= python3
BIN = .venv/bin
PIP = PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install -q
BUILD = $(BIN)/python setup.py -q build_ext --inplace

# What is missing, in Debian's words, all of it at once.
define NEEDS
@missing=; \
command -v $(PYTHON) >/dev/null || missing=" python3"; \
$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
|| missing="$$missing python3-dev"; \
command -v $${CC:-gcc} >/dev/null || missing="$$missing gcc"; \
echo '#include <stdio.h>' | $${CC:-gcc} -E - >/dev/null 2>&1 || missing="$$missing libc6-dev"; \
test -z "$$missing" || { echo "make needs more than is here: apt-get install$$missing"; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer: make PYTHON=..")'
endef

# A complete environment says in .venv/ready what it is. One that says nothing there, or is something else by now (moved,
# another Python, without pip), is made anew. One make at a time.
IDENTITY = $(BIN)/python -c "import pip, sys; print(sys.prefix, *sys.version_info[:2])"
all:
	@test -n "$(wildcard glmlora/_core.*.so)" || rm -f build/ready
	@flock Makefile sh -c '[ "$$($(IDENTITY))" = "$$(cat .venv/ready)" ] || rm -f .venv/ready' 2>/dev/null
	@flock Makefile $(MAKE) -s --no-print-directory build/ready

.venv/ready: pyproject.toml
	test -f $@ || rm -rf .venv
	$(NEEDS)
	echo "environment: .venv"
	test -d .venv || $(PYTHON) -m venv .venv
	rm -f $@
	$(PIP) "setuptools>=77" wheel "numpy>=2.0"
	$(BUILD)
	echo "environment: what pyproject.toml names"
	$(PIP) --no-build-isolation -e ".[test]"
	$(IDENTITY) >$@

# as old as the beginning: what is edited while it builds is built by the next one
build/ready: .venv/ready setup.py $(wildcard csrc/*.[ch] csrc/*/*.[ch] cuda/*.[ch] cuda/*.cu*)
	$(NEEDS)
	mkdir -p build
	touch $@.begun
	$(BUILD)
	mv $@.begun $@

test: all
	$(BIN)/python -m pytest -n 2 --dist worksteal

# what is marked `deep`: the kernels by nvcc where it is installed, and on the emulator at length (every seed in the checked
# build, every mutant); an op added to a copy
test-deep: all
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m deep

demo: all
	$(BIN)/glmlora demo demo

lint: all
	$(BIN)/ruff check . && $(BIN)/ruff format --check glmlora tests benchmarks setup.py
	$(BIN)/clang-format --dry-run -Werror csrc/*.[ch] csrc/*/*.[ch] cuda/*.c cuda/*.h cuda/*.cu cuda/*.cuh

fmt: all
	$(BIN)/ruff check --fix . && $(BIN)/ruff format glmlora tests benchmarks setup.py
	$(BIN)/clang-format -i csrc/*.[ch] csrc/*/*.[ch] cuda/*.c cuda/*.h cuda/*.cu cuda/*.cuh

bench: all
	$(BIN)/python benchmarks/bench.py

# torch, transformers, peft and llama.cpp (built for this processor, ten minutes; pip's cache may hold it built for
# another set), which bench then runs beside ours;
# `make peers SET=avx2`: llama.cpp alone, built for no more than AVX2, for `GLMLORA_ISA=avx2 make bench`
PEERS = benchmarks/peers/requirements-torch.txt benchmarks/peers/requirements-llama.txt
ifdef SET
AVX2_CMAKE = -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
SET_CMAKE_avx2 = $(AVX2_CMAKE)
SET_CMAKE_avxvnni = $(AVX2_CMAKE) -DGGML_AVX_VNNI=ON
SET_CMAKE_avx512 = $(AVX2_CMAKE) -DGGML_AVX512=ON
SET_CMAKE_avx512vnni = $(AVX2_CMAKE) -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON
peers:
	test -n "$(SET_CMAKE_$(SET))" || { echo "make peers: SET: expected avx2, avxvnni, avx512 or avx512vnni, got $(SET)"; exit 1; }
	test -x .peers-$(SET)/bin/python || $(PYTHON) -m venv .peers-$(SET)
	CMAKE_ARGS="$(SET_CMAKE_$(SET)) -DLLAVA_BUILD=OFF" .peers-$(SET)/bin/python -m pip install -q --no-cache-dir -r benchmarks/peers/requirements-llama.txt
else
peers:
	test -x .peers/bin/python || $(PYTHON) -m venv .peers
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .peers/bin/python -m pip install -q --no-cache-dir $(addprefix -r ,$(PEERS))
endif

# address and undefined-behaviour sanitizers; leaks are counted by tests/test_leaks.py (the interpreter has its own).
# Left out: what takes long and never enters the core, or enters another build of it.
UNRELATED = test_typing test_structure test_packaging test_benchmarks test_cuda_build test_cuda test_cuda_host test_install_cuda test_emu test_toy_op
sanitize: all
	GLMLORA_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	cd build/sanitize/lib && \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1 GLMLORA_SANITIZED=1 \
	PYTHONPATH=$(CURDIR)/build/sanitize/lib $(CURDIR)/$(BIN)/python -m pytest -n 2 --dist worksteal \
	-c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) $(UNRELATED:%=--ignore=$(CURDIR)/tests/%.py) $(CURDIR)/tests

# ThreadSanitizer over the pool, models in threads, forks, callbacks, signals and mapped files
tsan: all
	GLMLORA_SANITIZE=thread $(BIN)/python setup.py -q build --build-base build/tsan --build-lib build/tsan/lib
	cd build/tsan/lib && LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" GLMLORA_SANITIZED=1 GLMLORA_ISA=generic \
	TSAN_OPTIONS=die_after_fork=0:halt_on_error=1:exitcode=66:suppressions=$(CURDIR)/tests/tsan.supp \
	PYTHONPATH=$(CURDIR)/build/tsan/lib $(CURDIR)/$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml \
	--rootdir $(CURDIR) $(CURDIR)/tests/test_trust.py $(CURDIR)/tests/test_core.py $(CURDIR)/tests/test_threads.py \
	-k "(trust or threads or two_models or forked or ctrl_c or allocation) and not waits_for_another"

# the core compiles elsewhere: aarch64 (generic path) and clang, where those compilers are installed
CORE = $(filter-out csrc/python/% csrc/cpu/kernels_a% csrc/cpu/kernels_neon_%,$(wildcard csrc/*.c csrc/*/*.c))
portable:
	for cc in aarch64-linux-gnu-gcc clang; do command -v $$cc || continue; for f in $(CORE); do \
	$$cc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wshadow -Werror -Icsrc -c $$f -o /dev/null || exit 1; done; done

wheel: all
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

# What others install: manylinux2014 for x86-64 and aarch64, one wheel each for every CPython from 3.10 on, in dist/; and one
# for each CPython without a GIL that is found (tests/portable/free_threaded.sh makes one)
WHEELS = build/wheels-env/bin/python
wheels:
	test -x $(WHEELS) || $(PYTHON) -m venv build/wheels-env
	$(WHEELS) -m pip --disable-pip-version-check install -q -r tests/portable/requirements.txt
	$(WHEELS) tests/portable/build.py

# equal bytes again, the ABI, every Python of this machine, threads without a GIL, aarch64 under qemu, a clean Debian: what
# each needs, it says
wheels-check: wheels
	$(WHEELS) tests/portable/check.py

clean:
	rm -rf build dist .venv demo glmlora/*.so *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: all test test-deep demo lint fmt bench peers sanitize tsan portable wheel wheels wheels-check clean
