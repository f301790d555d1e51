# Sourced, not run: `. scripts/nvcc_env.sh [folder]`. Leaves CUDACXX naming an nvcc, for CMake and the tests.
# Where there is one already nothing is done. Else the compiler comes from pip wheels, into a folder of its own.
if [ -z "${CUDACXX:-}" ] && ! command -v nvcc >/dev/null; then
  nvcc_folder=$(realpath -m "${1:-build/nvcc}")
  nvcc_version=13.0
  if [ ! -e "$nvcc_folder/complete-$nvcc_version" ]; then
    # What an interrupted call has left pip would keep, with a mere warning.
    [ -n "${1:-}" ] || rm -rf "$nvcc_folder/nvidia"
    # The compiler wheel asks for the newest of the others, which must be of its own version.
    "${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$nvcc_folder" \
      "nvidia-cuda-nvcc==$nvcc_version.*" "nvidia-cuda-crt==$nvcc_version.*" "nvidia-nvvm==$nvcc_version.*" \
      "nvidia-cuda-runtime==$nvcc_version.*" "nvidia-cuda-cccl==$nvcc_version.*" || return 1
    touch "$nvcc_folder/complete-$nvcc_version"
  fi
  CUDACXX="$nvcc_folder/nvidia/cu13/bin/nvcc"
  # The linker looks in lib64, the wheels have lib.
  [ -e "$nvcc_folder/nvidia/cu13/lib64" ] || ln -s lib "$nvcc_folder/nvidia/cu13/lib64"
  export CUDACXX
  unset nvcc_folder nvcc_version
fi
