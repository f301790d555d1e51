#!/usr/bin/env bash
# The tests of the CPU kernels with the address and undefined-behaviour sanitizers of GCC: a kernel that reads or writes
# beyond a tensor, or computes what C++ leaves undefined, ends the run.
#
#   scripts/sanitize.sh [pytest arguments]        libraries and a copy of the package under build/sanitize
#
# The sanitizer sees the accesses of the scalar kernels all; of the wider ones all but those under a mask of lanes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
CXX=${CXX:-g++}
work=build/sanitize
tree=$work/tree

runtimes=""
for name in libasan.so libubsan.so; do
  path=$("$CXX" -print-file-name="$name")
  if [ ! -e "$path" ]; then
    echo "sanitize: $CXX has no $name; install GCC's sanitizers, or name another compiler: CXX=... $0" >&2
    exit 1
  fi
  runtimes+="${runtimes:+ }$(realpath "$path")"
done

# The package finds its libraries beside itself, and those of the ordinary build are to stay as they are.
rm -rf "$tree"
mkdir -p "$tree"
cp -r mnp_fast tests pyproject.toml "$tree"
rm -f "$tree"/mnp_fast/*.so
cmake -G Ninja -S . -B "$work/native" -DCMAKE_CXX_COMPILER="$CXX" -DPython_EXECUTABLE="$PYTHON" -DMNP_FAST_SANITIZE=on \
  -DMNP_FAST_CUDA=off -DMNP_OUTPUT_DIR="$PWD/$tree/mnp_fast"
cmake --build "$work/native"

cd "$tree"
# --capture=sys: a report that ends the process is to be seen. MNP_FAST_BACKEND: tests without a provider of their own
# are to run the kernels too, and to fail where they cannot.
env LD_PRELOAD="$runtimes" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. MNP_FAST_BACKEND=cpu \
  OMP_WAIT_POLICY=passive "$PYTHON" -m pytest -p no:cacheprovider --capture=sys -m "not gpu" \
  -k "cpu- or threads or stays_inside" "$@" tests/ops
