#!/usr/bin/env bash
# Runs everything that needs a GPU in at most 9 minutes, and prints a summary. Each part has a time limit and a file of
# its own, so what is done counts. A second run with the same OUT skips what is complete and continues the rest.
#
#   benchmarks/gpu_round.sh CIFAR10 OUT [WHEELS]
#
# CIFAR10: a folder of parquet files. OUT: the folder for all results. WHEELS: a folder of wheels of the packages that
# this machine lacks; without it, nothing is installed.
#
# Environment: SECONDS_IN_ALL (540) is the limit for everything. PYTHON (python3) is the interpreter.
# SMALL=1 shrinks all sizes, to try the script on a CPU with a longer limit; its numbers mean nothing.
set -uo pipefail
cifar10=$(realpath "$1") out=$(realpath -m "$2") wheels=${3:+$(realpath "$3")}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} end=$((SECONDS + ${SECONDS_IN_ALL:-540}))
export PYTHONPATH="$PWD/src:$PWD/benchmarks" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$out/triton_cache"
mkdir -p "$out"
small=() factor=1
if [ -n "${SMALL:-}" ]; then
  small=(--small) factor=3 # of the limits of parts
  command -v nvidia-smi >/dev/null || export TRITON_INTERPRET=1
fi

# part NAME LIMIT COMMAND...: at most LIMIT seconds and what is left of the time in all; its output goes to OUT/NAME.txt.
part() {
  local name=$1 limit=$(($2 * factor)) left=$((end - SECONDS - 15))
  shift 2
  [ -e "$out/$name.done" ] && return
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 1 ]; then
    echo "== $name: no time left"
    return
  fi
  echo "== $name: at most $limit s"
  timeout --signal TERM --kill-after 10 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  [ "${PIPESTATUS[0]}" = 0 ] && touch "$out/$name.done"
  echo "== $name: finished after $SECONDS s in all"
}

if [ -n "$wheels" ]; then
  for package in timm accelerate "jsonargparse[signatures]" gdown datasets psutil pytest; do
    "$python" -m pip install -q --no-index --find-links "$wheels" "$package" || echo "not installed: $package"
  done >"$out/install.txt" 2>&1
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | tee "$out/device.txt"

part ceilings 20 "$python" benchmarks/gpu_speed.py ceilings --out "$out/ceilings.jsonl"
# Kernels compile on the CPU while the tests run.
[ -e "$out/compile.done" ] || {
  timeout $((90 * factor)) "$python" benchmarks/gpu_speed.py compile "${small[@]}" >"$out/compile.txt" 2>&1 && touch "$out/compile.done"
} &
compiling=$!
part tests 60 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py
wait "$compiling"
part speed 150 "$python" benchmarks/gpu_speed.py speed "${small[@]}" --out "$out/speed.jsonl" --seconds $((130 * factor))
part tiles 65 "$python" benchmarks/triton_tiles.py "${small[@]}" --out "$out/tiles.json" --seconds $((50 * factor))
minutes=4
[ -n "${SMALL:-}" ] && minutes=0.05
part cifar10 "$end" "$python" benchmarks/cifar10_record.py "${small[@]}" --data "$cifar10" --out "$out/cifar10" \
  --minutes "$minutes" --num_workers "$(nproc)"
part loading 40 "$python" benchmarks/loading.py --num_workers "$(nproc)" --seconds 3 --rounds 2

"$python" benchmarks/gpu_summary.py "$out" | tee "$out/summary.txt"
