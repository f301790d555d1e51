"""The Triton kernels without a GPU: their results in Triton's interpreter, and their compilation for named GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
VECTORS = ["mask", "scale", "center", "shift"]
# An access of 16 bytes: four registers at a time.
WIDE = re.compile(r"ld\.global[.\w]*\.v4\.")


def test_interpreter_gives_the_same_results():
    # In a process of its own: the variable must be set before the kernels are decorated.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "triton-",
         str(HERE / "test_masked_affine.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 40, done.stdout


def compile_kernel(kernel, pointers: list[str], sizes: list[str], constants: dict, dtype: str, arch: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mnp_fast.ops.triton_masked_affine import OPTIONS

    signature = dict.fromkeys(pointers, POINTERS[dtype])
    signature |= dict.fromkeys([*VECTORS, "sum_g", "sum_gx"], "*fp32")
    signature |= dict.fromkeys(sizes, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    # Torch's allocations are aligned, and so is what the launcher would find for these sizes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS)
def test_compiles_without_a_gpu(dtype, arch, monkeypatch, tmp_path):
    # No compilation of an earlier run may stand in for this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mnp_fast.ops import triton_masked_affine as kernels

    for channels_last in (False, True):
        rows, cols = kernels.tile_sizes(3136 if not channels_last else 256, 1024 if not channels_last else 128)
        tile = {"BLOCK_ROWS": rows, "BLOCK_COLS": cols}
        forward = compile_kernel(
            kernels.forward_kernel,
            ["x", "residual", "y"],
            ["rows", "cols", "channels"],
            {"CHANNELS_LAST": channels_last, "HAS_RESIDUAL": True, "RELU": True, **tile},
            dtype,
            arch,
        )
        assert forward.asm["cubin"]
        assert WIDE.search(forward.asm["ptx"])
        flags = {"RELU": True, "HAS_Y": True, "NEED_X": True, "NEED_RESIDUAL": True, "TILES": 4, **tile}
        tensors = ["grad", "x", "y", "grad_x", "grad_residual"]
        kernel = kernels.backward_columns_kernel if channels_last else kernels.backward_planes_kernel
        sizes = ["positions", "chunks", "channels"] if channels_last else ["rows", "cols", "channels"]
        backward = compile_kernel(kernel, tensors, sizes, flags, dtype, arch)
        assert backward.asm["cubin"]
        assert WIDE.search(backward.asm["ptx"])
