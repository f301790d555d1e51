"""mask_step_ in Triton without a GPU: its results in the interpreter, its compilation for named GPUs."""

from __future__ import annotations

import os

import pytest
from triton_compile import WIDE, compile_kernel, run_in_interpreter

triton = pytest.importorskip("triton")


def test_interpreter_gives_the_same_results():
    assert sum(run_in_interpreter("test_mask_step.py").values()) >= 18


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_a_gpu(arch, monkeypatch, tmp_path):
    # No compilation of an earlier run may stand in for this one.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mnp_fast.ops import triton_mask_step as kernels

    types = dict.fromkeys(("mask", "momentum", "grad", "magnitude"), "*fp32")
    types |= dict.fromkeys(("rate", "decay", "penalty"), "fp32")
    compiled = compile_kernel(kernels.step_kernel, types, {"BLOCK": kernels.BLOCK}, arch, kernels.OPTIONS)
    assert compiled.asm["cubin"]
    assert WIDE.search(compiled.asm["ptx"])
    # A fused product and sum would give other bits than the other backends.
    assert "fma" not in compiled.asm["ptx"]
