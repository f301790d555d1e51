"""The Triton kernels without a GPU: their results in Triton's interpreter, and their compilation for named GPUs."""

from __future__ import annotations

import os

import pytest
from triton_compile import POINTERS, WIDE, compile_kernel, run_in_interpreter

from mnp_fast.ops.op_masked_act import ACTIVATIONS

triton = pytest.importorskip("triton")


def test_interpreter_gives_the_same_results():
    passed = run_in_interpreter("test_masked_act.py")
    assert passed["float32"] > 40
    assert passed["float16"] > 20


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "arch"), [("float32", 80), ("bfloat16", 80), ("bfloat16", 90), ("float16", 90)])
def test_compiles_without_a_gpu(dtype, arch, act, monkeypatch, tmp_path):
    # No compilation of an earlier run may stand in for this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mnp_fast.ops import triton_masked_act as kernels

    types = dict.fromkeys(["x", "y", "grad", "grad_x"], POINTERS[dtype]) | dict.fromkeys(["mask", "sum_gact"], "*fp32")
    for channels_last in (False, True):
        rows, cols = kernels.tile_sizes(3136 if not channels_last else 256, 1024 if not channels_last else 128)
        tile = {"ACT": act, "BLOCK_ROWS": rows, "BLOCK_COLS": cols}
        constants = {"CHANNELS_LAST": channels_last, **tile}
        forward = compile_kernel(kernels.forward_kernel, types, constants, arch)
        assert forward.asm["cubin"]
        assert WIDE.search(forward.asm["ptx"])
        kernel = kernels.backward_columns_kernel if channels_last else kernels.backward_planes_kernel
        constants = {"NEED_X": channels_last, "TILES": 4, **tile}
        backward = compile_kernel(kernel, types, constants, arch)
        assert backward.asm["cubin"]
        assert WIDE.search(backward.asm["ptx"])
