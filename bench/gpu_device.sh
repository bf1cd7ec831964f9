#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and no network, from the root of the tree:
#
#   python bench/gpu_pack.py      where there is a network: fills .gpu/, which is copied along
#   bench/gpu_device.sh OUT       there: builds, tests, measures; logs and results go to OUT
#
# Each part has a limit in seconds, 0 leaves it out; what a part did not reach is in its log.
#   BUILD_SECONDS=120  TESTS_SECONDS=120  BENCH_SECONDS=240  SANITIZE_SECONDS=0  SWEEP_SECONDS=0
#   TRAIN_SECONDS=0: bench/training_step.py, which takes about 90
# Without a build, the extension of the tree is used, which must be of the same Python.
# SWEEPS="ops attention ring" says which tilings and forms are timed, each with SWEEP_SECONDS;
# SWEEP_ARGS go to each of them: SWEEPS=ring SWEEP_ARGS='--forms "as it is"'.
# TESTS_ARGS, BENCH_ARGS and SANITIZE_ARGS go to pytest: BENCH_ARGS="-k 'not peer' --ungated". With a
# -k, the compiled peers are prepared only if WARM=1 says so.
# DRY=1 runs the benchmark on tiny models, to try this script out without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: bench/gpu_device.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
export PYTHONPATH=$site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH
[ -f .gpu/commit ] && MLF_COMMIT=$(cat .gpu/commit) && export MLF_COMMIT
eval "tests_args=(${TESTS_ARGS:-}) bench_args=(${BENCH_ARGS:-}) sanitize_args=(${SANITIZE_ARGS:--k persistent}) sweep_args=(${SWEEP_ARGS:-})"
limited() { timeout --signal=INT --kill-after=10 "$@"; }
say() { printf '\n== %ds: %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt"; }

say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -1)"
for wheel in .gpu/wheels/*.whl; do
  [ -f "$wheel" ] && "$python" -m zipfile -e "$wheel" "$site"
done
cp -r mobilellm_fast "$site/"
rm -rf "$site/mobilellm_fast/kernels" # a link, in trees that are used in place
cp -r kernels "$site/mobilellm_fast/"

# Inductor keeps what it compiled: the peers, which take a minute, are then ready sooner.
warm=()
if [ "${BENCH_SECONDS:-240}" != 0 ] && [[ ${BENCH_ARGS:-} != *-k* || -n ${WARM:-} ]]; then
  for peer in hf-compile gpt-fast torchao-int8; do
    "$python" bench/gpu_worker.py "$peer" 125M 128 ${DRY:+--dry} </dev/null >"$site/$peer.log" 2>&1 &
    warm+=($!)
  done
fi

build() {
  cmake -S . -B "$site/build" -GNinja -DMLF_ONLY_ISAS="${ISAS:-scalar}" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$site/mobilellm_fast" -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" && cmake --build "$site/build" --parallel
}
export -f build
export site python
if [ "${BUILD_SECONDS:-120}" != 0 ]; then
  say "build"
  rm -f "$site"/mobilellm_fast/_C*.so
  limited "${BUILD_SECONDS:-120}" bash -c build >"$out/build.log" 2>&1 || {
    tail -20 "$out/build.log"
    cp mobilellm_fast/_C*.so "$site/mobilellm_fast/" # better than nothing, if the tree has one
  }
fi
say "built: $(cd "$site" && "$python" -c 'import mobilellm_fast._C as c; print(c.__file__, c.supported_isas())' 2>&1 | tail -1)"

if [ "${TESTS_SECONDS:-120}" != 0 ]; then
  say "tests"
  # one test at a time to each process: those that compile much stand side by side in the files
  chunk=$("$python" -m pytest --help 2>/dev/null | grep -o -m1 -- --maxschedchunk)
  files=$(grep -l 'mark\.gpu' tests/test_*.py) # every process imports what it collects
  limited "${TESTS_SECONDS:-120}" "$python" -m pytest $files -m gpu -n "$(nproc)" ${chunk:+"$chunk=1"} -v --tb=short \
    --durations=20 --failures "$out/failures.log" "${tests_args[@]}" >"$out/tests.log" 2>&1
  say "tests ended with status $?: $(tail -1 "$out/tests.log")"
  cut -c1-300 "$out/failures.log" 2>/dev/null | head -40
fi

if [ "${TRAIN_SECONDS:-0}" != 0 ]; then
  say "training step"
  limited "$TRAIN_SECONDS" "$python" bench/training_step.py --device cuda --out "$out/training_step.json" \
    >"$out/training_step.log" 2>&1
  say "training step ended with status $?"
  grep -E '^(\||losses)|apart' "$out/training_step.log"
fi

if [ "${SANITIZE_SECONDS:-0}" != 0 ]; then
  say "compute-sanitizer"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$SANITIZE_SECONDS" compute-sanitizer --error-exitcode 9 --report-api-errors no \
    "$python" -m pytest tests -m gpu -p no:xdist "${sanitize_args[@]}" >"$out/sanitizer.log" 2>&1
  say "compute-sanitizer ended with status $?: $(tail -1 "$out/sanitizer.log")"
fi

if [ "${SWEEP_SECONDS:-0}" != 0 ]; then
  for sweep in ${SWEEPS:-ops attention}; do
    say "sweep of $sweep"
    limited "$SWEEP_SECONDS" "$python" "bench/sweep_$sweep.py" --json "$out/sweep_$sweep.json" "${sweep_args[@]}" \
      >"$out/sweep_$sweep.log" 2>&1
    say "sweep of $sweep ended with status $?"
    grep -E "chosen|cuBLAS|compiled|^[a-z]| us \(|tokens:" "$out/sweep_$sweep.log" | cut -c1-120
  done
fi

if [ "${BENCH_SECONDS:-240}" != 0 ]; then
  end=$((SECONDS + ${BENCH_SECONDS:-240}))
  patience=$((SECONDS + 30))
  for pid in "${warm[@]}"; do
    while kill -0 "$pid" 2>/dev/null && [ $SECONDS -lt $patience ]; do sleep 0.5; done
    kill "$pid" 2>/dev/null
  done
  again=()
  for try in 1 2 3 4; do # a kernel that hangs or faults takes its process with it, not the rest
    left=$((end - SECONDS))
    [ $left -lt 20 ] && break
    say "benchmark, try $try, $left s"
    limited $left "$python" -m pytest bench/bench_gpu.py --benchmark-only -m gpu -p no:xdist \
      --tb=short --show-capture=no --gpu-results "$out" ${DRY:+--dry} "${again[@]}" "${bench_args[@]}" >"$site/bench.log" 2>&1
    say "benchmark ended with status $?"
    sed 's/^/  /' "$site/bench.log" >>"$out/bench.log"
    sed -n '/goals of the GPU/,/^$/p' "$site/bench.log"
    grep -q "goals of the GPU" "$site/bench.log" && ! grep -q "the GPU was lost" "$out"/*-20*.json && break
    again=(--missing)
  done
fi
rm -rf "$site"
if [ "$(find "$out" -type f | wc -l)" -gt 8 ]; then # more may not be wanted back
  (cd "$out" && tar czf logs.tar.gz -- *.log && rm -- *.log)
fi
say "done"
