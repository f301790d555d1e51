"""The Triton kernels without a GPU: their results in Triton's interpreter, and their compilation for named GPUs."""

from __future__ import annotations

import os

import pytest
from triton_cases import POINTERS, WIDE, compile_kernel, passed_in_interpreter

triton = pytest.importorskip("triton")


def test_interpreter_gives_the_same_results():
    assert passed_in_interpreter("masked_affine") > 40


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS)
def test_compiles_without_a_gpu(dtype, arch, monkeypatch, tmp_path):
    # No compilation of an earlier run may stand in for this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mnp_fast.ops import triton_masked_affine as kernels

    def compile_for(kernel, tensors, sizes, constants):
        types = dict.fromkeys(tensors, POINTERS[dtype]) | dict.fromkeys(sizes, "i32")
        types |= dict.fromkeys(["mask", "scale", "center", "shift"], "*fp32")
        if "sum_g" in kernel.arg_names:
            types |= dict.fromkeys(["sum_g", "sum_gx"], "*fp32")
        # Torch's allocations are aligned, and so is what the launcher would find for these sizes.
        return compile_kernel(kernel, types, constants, kernels.OPTIONS, arch)

    for channels_last in (False, True):
        rows, cols = kernels.tile_sizes(3136 if not channels_last else 256, 1024 if not channels_last else 128)
        tile = {"BLOCK_ROWS": rows, "BLOCK_COLS": cols}
        forward = compile_for(
            kernels.forward_kernel,
            ["x", "residual", "y"],
            ["rows", "cols", "channels"],
            {"CHANNELS_LAST": channels_last, "HAS_RESIDUAL": True, "RELU": True, **tile},
        )
        assert forward.asm["cubin"]
        assert WIDE.search(forward.asm["ptx"])
        flags = {"RELU": True, "HAS_Y": True, "NEED_X": True, "NEED_RESIDUAL": True, "TILES": 4, **tile}
        tensors = ["grad", "x", "y", "grad_x", "grad_residual"]
        kernel = kernels.backward_columns_kernel if channels_last else kernels.backward_planes_kernel
        sizes = ["positions", "chunks", "channels"] if channels_last else ["rows", "cols", "channels"]
        backward = compile_for(kernel, tensors, sizes, flags)
        assert backward.asm["cubin"]
        assert WIDE.search(backward.asm["ptx"])
