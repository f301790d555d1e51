"""The Triton kernels without a GPU: their results in Triton's interpreter, and their compilation for named GPUs."""

from __future__ import annotations

import os

import pytest
from triton_compile import POINTERS, WIDE, compile_kernel, run_in_interpreter

triton = pytest.importorskip("triton")

PARTS = dict.fromkeys(["part_k", "part_sum", "part_square"], "*fp32")
VECTORS = dict.fromkeys(["mask", "scale", "center", "shift", "slope", "offset"], "*fp32")


def test_interpreter_gives_the_same_results():
    passed = run_in_interpreter("test_masked_batch_norm.py")
    assert passed["float32"] > 40
    assert passed["float16"] > 20


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("flag", [True, False])
def test_compiles_without_a_gpu(flag, dtype, arch, monkeypatch, tmp_path):
    # No compilation of an earlier run may stand in for this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mnp_fast.ops import triton_masked_batch_norm as kernels
    from mnp_fast.ops.triton_common import tile_sizes

    for channels_last in (False, True):
        rows, cols = tile_sizes(3136 if not channels_last else 256, 1024 if not channels_last else 128)
        tile = {"BLOCK_ROWS": rows, "BLOCK_COLS": cols}
        kernel = kernels.sums_columns_kernel if channels_last else kernels.sums_planes_kernel
        sums = compile_kernel(kernel, {"x": POINTERS[dtype]} | PARTS, tile | {"TILES": 4}, arch)
        grad_x = compile_kernel(
            kernels.grad_x_kernel,
            dict.fromkeys(["grad", "x", "y", "grad_x"], POINTERS[dtype]) | VECTORS,
            {"CHANNELS_LAST": channels_last, "RELU": flag, "HAS_Y": flag, **tile},
            arch,
        )
        for compiled in (sums, grad_x):
            assert compiled.asm["cubin"]
            assert WIDE.search(compiled.asm["ptx"])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
def test_finish_compiles_without_a_gpu(arch, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mnp_fast.ops import triton_masked_batch_norm as kernels

    compiled = compile_kernel(
        kernels.finish_kernel,
        PARTS | dict.fromkeys(["weight", "mean", "rstd", "scale"], "*fp32") | {"eps": "fp32"},
        {"BLOCK_PARTS": kernels.FINISH_PARTS, "BLOCK_COLS": kernels.FINISH_CHANNELS},
        arch,
    )
    assert compiled.asm["cubin"]
