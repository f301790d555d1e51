"""channel_magnitude in Triton without a GPU: its results in the interpreter, its compilation for named GPUs."""

from __future__ import annotations

import os
import re

import pytest
import torch
from triton_compile import POINTERS, WIDE, compile_kernel, run_in_interpreter

triton = pytest.importorskip("triton")


def test_interpreter_gives_the_same_results():
    assert sum(run_in_interpreter("test_channel_magnitude.py").values()) >= 10


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", POINTERS)
def test_compiles_without_a_gpu(dtype, arch, monkeypatch, tmp_path):
    # No compilation of an earlier run may stand in for this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton.language as tl

    from mnp_fast.ops import triton_channel_magnitude as kernels

    types = {"table": "*i64", "out": "*fp32"}
    constants = {"BLOCK_TENSORS": 64, "SHORT": kernels.SHORT, "TILE": kernels.TILE, "DTYPE": getattr(tl, dtype)}
    # Only pointers are known to be aligned: that rows are, the kernel asks for itself.
    compiled = compile_kernel(kernels.magnitude_kernel, types, constants, arch, aligned=("table", "out"))
    assert compiled.asm["cubin"]
    # Both kinds: reads of 16 bytes where rows allow them, and no others where they do not.
    assert WIDE.search(compiled.asm["ptx"])
    assert re.search(rf"ld\.global\.b{torch.finfo(getattr(torch, dtype)).bits} ", compiled.asm["ptx"])
