"""What the tests of Triton kernels share: results in the interpreter, and compilation for a GPU that is not there."""

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


def passed_in_interpreter(file: str) -> int:
    """Number of the Triton tests in `file` that pass in Triton's interpreter; none may fail."""
    # In a process of its own: the variable must be set before the kernels are decorated.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "triton-", str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    return int(passed[1])


def compile_kernel(kernel, pointers: dict[str, str], scalars: dict[str, str], constants: dict, arch: int):
    """`pointers` and `scalars`: type of every argument that is no constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mnp_fast.ops.triton_masked_affine import OPTIONS

    signature = pointers | scalars | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    # Torch's allocations are aligned, and so is what the launcher would find for these sizes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS)
