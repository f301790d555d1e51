"""What the tests of Triton kernels share: the interpreter in a process of its own, and compilation without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
# An access of 16 bytes: four registers at a time.
WIDE = re.compile(r"ld\.global[.\w]*\.v4\.")


def run_in_interpreter(tests: str) -> int:
    """Number of tests of a file that pass on the Triton kernels in its interpreter; AssertionError where one fails."""
    # In a process of its own: the variable must be set before the kernels are decorated.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "triton-",
         str(HERE / tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    return int(passed[1])


def compile_kernel(kernel, pointers: list[str], floats: list[str], constants: dict, dtype: str, arch: int):
    """`pointers` are to `dtype`, `floats` to float32, what is no constant either is a size."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mnp_fast.ops.triton_common import OPTIONS

    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= dict.fromkeys(pointers, POINTERS[dtype])
    signature |= dict.fromkeys(floats, "*fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    # Torch's allocations are aligned, and so is what the launcher would find for these sizes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS)
