#!/usr/bin/env bash
# What a processor's kernel tables do, on a machine without a network, from the root of the tree:
# builds, tests every table there is, and times prompts and decoding. Logs and results go to OUT.
#
#   bench/cpu_device.sh OUT
#
# It needs a C++ compiler (GCC 11 or newer for AMX), CMake, ninja, and in Python numpy, pybind11 and
# pytest. Each part has a limit in seconds, 0 leaves it out:
#   BUILD_SECONDS=60  TESTS_SECONDS=20  BENCH_SECONDS=25
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: bench/cpu_device.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# The tree itself stays off Python's path: its package lacks the extension.
export PYTHONPATH=$site:$PWD/bench:$PWD/tests PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH
limited() { timeout --signal=INT --kill-after=5 "$@"; }
say() { printf '\n== %ds: %s\n' "$SECONDS" "$*" | tee -a "$out/cpu_summary.txt"; }

say "$(lscpu | sed -n 's/^Model name: *//p'), $(nproc --all) processors, $(uname -r), $(c++ --version | head -1)"
say "flags: $(grep -m1 ^flags /proc/cpuinfo | grep -oE '\b(avx2|avx_vnni|avx512[a-z_0-9]*|amx_[a-z0-9]+)\b' | tr '\n' ' ')"
lscpu >"$out/lscpu.txt"
cp -r mobilellm_fast "$site/"
cp -r kernels "$site/mobilellm_fast/"

build() {
  cmake -S . -B "$site/build" -GNinja -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$site/mobilellm_fast" \
    -DMLF_ONLY_ISAS="${ISAS:-amx;avx512vnni;avxvnni;avx2;scalar}" \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" && cmake --build "$site/build" --parallel
}
export -f build
export site python
if [ "${BUILD_SECONDS:-60}" != 0 ]; then
  say "build"
  rm -f "$site"/mobilellm_fast/_C*.so
  limited "${BUILD_SECONDS:-60}" bash -c build >"$out/build.log" 2>&1 || tail -20 "$out/build.log"
fi
say "tables: $("$python" -c 'import mobilellm_fast._C as c; print("compiled", *c.compiled_isas(), "- running", *c.supported_isas())' 2>&1 | tail -1)"

if [ "${TESTS_SECONDS:-20}" != 0 ]; then
  say "tests"
  workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8")
  # shellcheck disable=SC2086
  limited "${TESTS_SECONDS:-20}" "$python" -m pytest tests/test_kernels.py -q $workers -p no:cacheprovider \
    -k "linear or swiglu or weight_byte or touched" >"$out/tests.log" 2>&1
  say "tests ended with status $?: $(tail -1 "$out/tests.log")"
  grep -E '^(FAILED|ERROR)' "$out/tests.log" | cut -c1-200 | head -20
fi

if [ "${BENCH_SECONDS:-25}" != 0 ]; then
  say "timings"
  limited "${BENCH_SECONDS:-25}" "$python" bench/cpu_device.py 2>&1 | tee "$out/timings.txt"
fi
say "done"
