#!/usr/bin/env bash
# Everything that only a machine with a GPU can check, within 10 minutes and without a network: build, GPU tests, memory
# and race checks of the kernels, and their bandwidth beside that of a copy.
#
#   scripts/gpu_check.sh          results under ${OUT:-build/gpu_check}: <step>.log, <step>.rc, and summary.txt
#
# A step that fails does not stop the others. The exit code is the number of steps that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONUNBUFFERED=1 MNP_FAST_CUDA=on OMP_WAIT_POLICY=passive
failed=0
: >"$OUT/summary.txt"

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  echo "$rc" >"$OUT/$name.rc"
  [ "$rc" -eq 0 ] || failed=$((failed + 1))
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

gpu_tests() { "$PYTHON" -m pytest -m gpu -rfE --durations=10 tests; }

# Without torch's cache every tensor is an allocation of its own, at whose end the checker stands.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 \
    "$PYTHON" -m pytest -p no:cacheprovider -m gpu -k "$2" tests/ops
}

bandwidth() {
  "$PYTHON" - <<'PY'
import torch

from mnp_fast.ops import available, force_backend, masked_affine

backward = torch.ops.mnp_fast.masked_affine_backward.default


def gigabytes_per_second(call, moved):
    for _ in range(5):
        call()
    times = []
    for _ in range(30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return moved / sorted(times)[len(times) // 2] / 1e9


backends = available("masked_affine", torch.device("cuda"), torch.float32)
print(torch.cuda.get_device_name(), "GB/s, share of a copy; backends:", *backends)
for shape in ((32, 256, 56, 56), (64, 2048, 7, 7), (32, 64, 112, 112)):
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format)
            y, grad = torch.randn_like(x), torch.randn_like(x)
            vectors = [torch.rand(shape[1], device="cuda") for _ in range(4)]
            size = x.numel() * x.element_size()
            copy = gigabytes_per_second(lambda: y.copy_(x), 2 * size)
            print(shape, dtype, memory_format, f"copy {copy:.0f}")
            for backend in backends:
                with torch.no_grad(), force_backend(backend):
                    rows = {
                        "forward": (lambda: masked_affine(x, *vectors), 2),
                        "forward residual relu": (lambda: masked_affine(x, *vectors, y, act="relu"), 3),
                        "backward": (lambda: backward(grad, x, None, *vectors, 1, "none", True, False), 3),
                        "backward relu": (lambda: backward(grad, x, None, *vectors, 1, "relu", True, False), 3),
                        "backward residual relu": (lambda: backward(grad, x, y, *vectors, 1, "relu", True, True), 5),
                    }
                    for name, (call, passes) in rows.items():
                        rate = gigabytes_per_second(call, passes * size)
                        print(f"  {backend:<10}{name:<24}{rate:7.0f} {rate / copy:6.2f}")
PY
}

export PYTHON
export -f machine build gpu_tests sanitize bandwidth
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

step machine 40 bash -c machine
step build 150 bash -c build
step diagnosis 40 "$PYTHON" -m mnp_fast
step gpu_tests 150 bash -c gpu_tests
step memcheck 90 bash -c "sanitize memcheck 'matches and gpu-cuda'"
step racecheck 60 bash -c "sanitize racecheck 'matches and gpu-cuda-torch.float32'"
step bandwidth 60 bash -c bandwidth

echo "failed steps: $failed" | tee -a "$OUT/summary.txt"
exit "$failed"
