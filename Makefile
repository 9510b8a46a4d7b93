# Commands for people. Everything is made under .venv/ and build/; stamp files tell what is up to date.
#   make venv        the development environment: an editable install that rebuilds the C code at import
#   make demo        a primary and its secondaries on this machine, with checks
#   make test        lint, types and all tests (native-test, unit, fuzz, multiprocess, fault, interop); what this machine lacks is skipped by name (DPDKMEM_REQUIRE=… forbids)
#   make test-again  the tests of pytest that failed last
#   make asan tsan   the tests of tests/c under the sanitizers
#   make model       the protocol of caches under the model checker spin(1)
#   make storm       10,000 kills at random moments (minutes)
#   make fuzz-heap fuzz-vhost   libFuzzer on the heap, and on virtqueues of hostile drivers, with clang
#   make dist-check  sdist -> wheel -> import from a clean environment, of the last commit
#   make vm-test     the tests of tests/vm, in virtual machines (docs/testing.md); before it, once: make vm-tools vm-kernel, as root
#   make vm-again    of these, a few that failed last
#   make soak bench  minutes of random operations; figures as JSON
# PYTHON=… chooses the interpreter, PYTEST_ARGS=… narrows the tests.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test

PYTHON ?= $(shell command -v python3 || echo python3)
PYTHON := $(PYTHON)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# meson-python, meson and ninja look for each other on PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# How programs are run here: on the farm, see .ci/farm; the first variable turns the hook of the editable install off.
RUN := MESONPY_EDITABLE_SKIP=$(CURDIR)/build/editable PYTHONPATH=$(CURDIR)/build/farm

.PHONY: venv tools build demo test test-again lint format typecheck native-test unit fuzz multiprocess fault interop asan tsan model dist-check \
  fuzz-heap fuzz-vhost storm vm-tools vm-kernel vm-test vm-again soak bench clean

venv: .venv/.installed

tools:
	@.ci/tools $(PYTHON)

.venv/.created: | tools
	$(PYTHON) -m venv .venv
	touch $@

# Build requirements first: --no-build-isolation takes them from the environment. Their list is pyproject's.
.venv/.requirements: pyproject.toml .venv/.created
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  | $(PIP) install -r /dev/stdin
	touch $@

.venv/.installed: pyproject.toml meson.options .venv/.requirements
	$(PIP) install --no-build-isolation --config-settings=build-dir=build/editable -e '.[test]'
	touch $@

# Also after a change of a meson.build: ninja runs meson by itself.
build: venv
	$(BIN)/ninja -C build/editable --quiet
	.ci/farm

demo: build
	$(RUN) $(BIN)/dpdkmem demo

test: lint typecheck native-test
	$(RUN) $(BIN)/pytest tests $(PYTEST_ARGS)

test-again: build
	$(RUN) $(BIN)/pytest tests --last-failed --last-failed-no-failures=none

unit multiprocess fault fuzz interop: build
	$(RUN) $(BIN)/pytest tests/$@ $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

typecheck: build
	MYPYPATH=build/farm $(BIN)/mypy -p dpdkmem
	MYPYPATH=build/farm:tests/multiprocess:tests/interop:tests/vm $(BIN)/mypy --explicit-package-bases tests
	MYPYPATH=build/farm $(BIN)/mypy .ci/*.py
	MYPYPATH=build/farm:benchmarks $(BIN)/mypy --explicit-package-bases benchmarks

# The C library alone, without Python (an interpreter would have to be instrumented too): `$(call native,NAME,OPTIONS)`.
# b_lundef: the run-time library of a sanitizer is in the program, not in libdpdkmem.so.
native = $(BIN)/meson setup $(if $(wildcard build/$(1)/build.ninja),--reconfigure) build/$(1) --buildtype=debugoptimized \
  -Dpython=false -Dnative_tests=true -Db_lundef=false $(2) >build/$(1).log || { cat build/$(1).log; exit 1; }
comma := ,
STORM_KILLS := 10000
FUZZ_SECONDS := 300

native-test: venv
	$(call native,plain,-Ddm_check=2)
	$(BIN)/meson test -C build/plain --print-errorlogs

asan: venv
	$(call native,asan,-Ddm_check=2 -Db_sanitize=address$(comma)undefined)
	ASAN_OPTIONS=detect_leaks=1:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/meson test -C build/asan --print-errorlogs

# Races between lanes: the shared structures run as several lanes of one process, TSan does not see other processes.
tsan: venv
	$(call native,tsan,-Db_sanitize=thread)
	TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $(BIN)/meson test -C build/tsan --print-errorlogs

# Every interleaving of the protocol of caches; what is broken on purpose must be found.
model:
	tests/model/check

dist-check: venv
	$(BIN)/python .ci/dist_check.py

# Needs clang. FUZZ_SECONDS=… says for how long; what it finds is left in build/fuzz.
fuzz-heap fuzz-vhost: fuzz-%:
	mkdir -p build/fuzz/corpus-$*
	clang -g -O1 -D_GNU_SOURCE -DFUZZER -DDM_CHECK=1 '-DDM_VERSION="fuzz"' -fsanitize=fuzzer,address,undefined \
	  -Inative -Itests/c tests/c/fuzz_$*.c native/*.c -lpthread -ldl -o build/fuzz/fuzz_$*
	cd build/fuzz && ./fuzz_$* -max_len=4096 -max_total_time=$(FUZZ_SECONDS) corpus-$*

# The long form of the storm that `make native-test` runs with some hundred kills.
storm: venv
	$(call native,storm,-Ddm_check=1)
	DM_STORM_KILLS=$(STORM_KILLS) build/storm/tests/c/test_storm
	DM_STORM_KILLS=$(STORM_KILLS) build/storm/tests/c/test_storm caches

vm-tools:
	type qemu-system-x86_64 flex bison bc >/dev/null 2>&1 && test -e /usr/src/linux-source-6.12.tar.xz -a -e /usr/include/libelf.h || { apt-get -qq update && \
	  apt-get -qq install -y --no-install-recommends qemu-system-x86 iproute2 linux-source-6.12 flex bison bc build-essential libelf-dev xz-utils; }

vm-kernel:
	tests/vm/mkkernel $${DPDKMEM_VM_KERNEL:-build/vm}

vm-test: build
	tests/vm/test $(PYTEST_ARGS)

vm-again: build
	tests/vm/test --again $(PYTEST_ARGS)

soak: build
	$(RUN) $(BIN)/pytest tests -m soak --timeout=1800 $(PYTEST_ARGS)

bench: build
	$(RUN) $(BIN)/python benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf build dist .venv
