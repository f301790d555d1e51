"""The Triton kernels without a GPU: their results in Triton's interpreter, and their compilation for named GPUs."""

from __future__ import annotations

import os

import pytest
from triton_compile import POINTERS, WIDE, compile_kernel, run_in_interpreter

triton = pytest.importorskip("triton")

VECTORS = dict.fromkeys(["mask", "scale", "center", "shift", "sum_g", "sum_gx"], "*fp32")


def test_interpreter_gives_the_same_results():
    passed = run_in_interpreter("test_masked_affine.py")
    assert passed["float32"] > 40
    assert passed["float16"] > 20


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("flag", [True, False])
def test_compiles_without_a_gpu(flag, dtype, arch, monkeypatch, tmp_path):
    # No compilation of an earlier run may stand in for this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mnp_fast.ops import triton_masked_affine as kernels

    tensors = dict.fromkeys(["x", "residual", "y", "grad", "grad_x", "grad_residual"], POINTERS[dtype])
    for channels_last in (False, True):
        rows, cols = kernels.tile_sizes(3136 if not channels_last else 256, 1024 if not channels_last else 128)
        tile = {"BLOCK_ROWS": rows, "BLOCK_COLS": cols}
        constants = {"CHANNELS_LAST": channels_last, "HAS_RESIDUAL": flag, "RELU": flag, **tile}
        forward = compile_kernel(kernels.forward_kernel, tensors | VECTORS, constants, arch)
        assert forward.asm["cubin"]
        assert WIDE.search(forward.asm["ptx"])
        flags = dict.fromkeys(["RELU", "HAS_Y", "NEED_X", "NEED_RESIDUAL"], flag) | {"TILES": 4, **tile}
        kernel = kernels.backward_columns_kernel if channels_last else kernels.backward_planes_kernel
        backward = compile_kernel(kernel, tensors | VECTORS, flags, arch)
        assert backward.asm["cubin"]
        assert WIDE.search(backward.asm["ptx"])
