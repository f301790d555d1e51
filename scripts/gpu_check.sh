#!/usr/bin/env bash
# Everything that only a machine with a GPU can check, without a network; each call takes at most 10 minutes.
#
#   scripts/gpu_check.sh          build, GPU tests, memory and race checks of the kernels
#   scripts/gpu_check.sh bench    build, then the benchmarks: ops beside a copy, steps of three networks, statistics
#
# Results under ${OUT:-build/gpu_check}: <step>.log, <step>.rc, summary.txt, and <benchmark>.json.
# A step that fails does not stop the others. The exit code is the number of steps that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONUNBUFFERED=1 MNP_FAST_CUDA=on OMP_WAIT_POLICY=passive
: >"$OUT/summary.txt"
rm -f "$OUT"/*.rc

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  echo "$rc" >"$OUT/$name.rc"
  printf '%-12s rc %-3s %4s s   %s\n' "$name" "$rc" "$((SECONDS - start))" \
    "$(tail -n 1 "$OUT/$name.log" | cut -c1-150)" | tee -a "$OUT/summary.txt"
}

machine() {
  nvidia-smi
  nvcc --version
  "$PYTHON" - <<'PY'
import importlib.util
import sys
from importlib import metadata

print(sys.version)
for name in ("torch", "triton", "numpy", "safetensors", "rich", "Pillow", "torchvision", "timm", "transformers",
             "pytest", "setuptools", "cmake", "ninja", "pybind11", "scikit-learn"):
    try:
        print(f"{name:<14}{metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name:<14}MISSING")
import torch

print("device:", torch.cuda.get_device_name() if torch.cuda.is_available() else "NONE")
sys.exit(not torch.cuda.is_available())
PY
}

build() {
  if "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .; then
    return 0
  fi
  echo "pip could not build (see above); CMake by itself, and the source folder on PYTHONPATH:"
  for tool in cmake ninja c++ nvcc; do
    command -v "$tool" || echo "MISSING: $tool"
  done
  cmake --fresh -G Ninja -S . -B build/native -DPython_EXECUTABLE="$PYTHON" -DMNP_FAST_CUDA=on &&
    cmake --build build/native
}

# A kernel that faults takes all later tests of its process with it: a process for every backend of every file.
gpu_tests() {
  local folder file backend job failed=0
  folder=$(mktemp -d)
  local pytest=("$PYTHON" -m pytest -p no:cacheprovider -m gpu -rfE --durations=5)
  for file in $(grep -l provider tests/ops/test_*.py); do
    for backend in cuda triton reference; do
      "${pytest[@]}" -k "gpu-$backend" "$file" >"$folder/$(basename "$file" .py)-$backend" 2>&1 &
    done
  done
  "${pytest[@]}" -k "not (gpu-cuda or gpu-triton or gpu-reference)" tests >"$folder/others" 2>&1 &
  # 5: no test of that name.
  for job in $(jobs -p); do
    wait "$job" || [ $? -eq 5 ] || failed=1
  done
  tail -n +1 "$folder"/*
  tail -qn 1 "$folder"/*
  return "$failed"
}

# Without torch's cache every tensor is an allocation of its own, at whose end the checker stands.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 \
    "$PYTHON" -m pytest -p no:cacheprovider -m gpu -k "$2" tests/ops
}

export PYTHON
export -f machine build gpu_tests sanitize
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

step machine 40 bash -c machine
step build 150 bash -c build
step diagnosis 40 "$PYTHON" -m mnp_fast
if [ "${1:-check}" = bench ]; then
  step ops 150 "$PYTHON" -m benchmarks.ops --device cuda --batch 64 --json "$OUT/ops.json"
  step resnet50 130 "$PYTHON" -m benchmarks.step --device cuda --arch resnet50 --batch 64 --json "$OUT/step.json"
  step resnet18 90 "$PYTHON" -m benchmarks.step --device cuda --arch resnet18 --size 32 --batch 128 --json "$OUT/step.json"
  step vit 130 "$PYTHON" -m benchmarks.step --device cuda --arch timm/vit_base_patch16_224 --batch 64 \
    --json "$OUT/step.json"
  step stats 60 "$PYTHON" -m benchmarks.stats --device cuda --arch resnet50 --batch 8 --json "$OUT/stats.json"
else
  # Side by side: none of them is timed.
  step gpu_tests 240 bash -c gpu_tests &
  step memcheck 240 bash -c "sanitize memcheck 'matches and gpu-cuda'" &
  step racecheck 240 bash -c "sanitize racecheck 'matches and gpu-cuda-torch.float32'" &
  wait
fi
failed=$(grep -Lx 0 "$OUT"/*.rc | wc -l)

echo "failed steps: $failed" | tee -a "$OUT/summary.txt"
exit "$failed"
