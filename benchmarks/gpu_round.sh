#!/usr/bin/env bash
# Runs everything that needs a GPU: the tests marked gpu, the benchmarks, and the CIFAR-10 recipes.
# A second run skips the finished parts and continues the training.
#
#   benchmarks/gpu_round.sh CIFAR10 IMAGES OUT MINUTES
#
# CIFAR10: a folder of parquet files, or the name cifar10. IMAGES: a folder of photos. OUT: the folder for all results.
# MINUTES: time limit of recipes/cifar10.yaml. Each of the three recipes with deep models gets a quarter of it.
set -uo pipefail
cd "$(dirname "$0")/.."
cifar10=$1 images=$2 out=$3 minutes=$4
export PYTHONPATH="$PWD/src" PYTHONUNBUFFERED=1
mkdir -p "$out"

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/device.txt"
if [ ! -e "$out/tests.txt" ]; then
  python3 -m pytest -m gpu 2>&1 | tee "$out/tests.txt"
  python3 benchmarks/distillation.py --images "$images" --batch-size 128 2>&1 | tee "$out/distillation.txt"
fi
for models in t s; do
  for batch in 1 128 512; do
    file="$out/inference_${models}_$batch"
    [ -e "$file.txt" ] || python3 benchmarks/performance.py inference --models $models --batch-size $batch --memory \
      --engines eager,fused,compile,cudagraphs 2>&1 | tee "$file.txt"
    python3 benchmarks/performance_figure.py "$file.txt" "$file.png"
  done
  file="$out/training_${models}_128"
  [ -e "$file.txt" ] || python3 benchmarks/performance.py training --models $models --batch-size 128 --memory \
    2>&1 | tee "$file.txt"
  python3 benchmarks/performance_figure.py "$file.txt" "$file.png"
done
file="$out/depth_steps"
[ -e "$file.jsonl" ] || python3 benchmarks/depth_cost.py steps --device cuda --batch_size 64 --out "$file.jsonl" 2>&1 |
  tee "$file.txt"
for layers in 20 108 1008; do
  timeout --signal TERM "$((minutes / 4 + 1))m" python3 -m sret.cli train --config recipes/cifar10_deep.yaml \
    --model "sret_deep_${layers}_32" --data "$cifar10" --out "$out/cifar10_deep_$layers" --num_workers "$(nproc)" \
    --save_every 100 --resume auto 2>&1 | tee -a "$out/cifar10_deep_$layers.txt"
done
timeout --signal TERM "${minutes}m" python3 -m sret.cli train --config recipes/cifar10.yaml --data "$cifar10" \
  --out "$out/cifar10" --num_workers "$(nproc)" --save_every 500 --resume auto 2>&1 | tee -a "$out/cifar10.txt"
python3 -m sret.cli eval --checkpoint "$out/cifar10/best.safetensors" --data "$cifar10" | tee "$out/accuracy.txt"
