"""What the tests of the Triton kernels share: the interpreter in its own process, and compilation without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
# An access of 16 bytes: four registers at a time.
WIDE = re.compile(r"ld\.global[.\w]*\.v4\.")


def run_in_interpreter(tests: str) -> dict[str, int]:
    """How many tests of a file pass on the Triton kernels in its interpreter, by dtype; AssertionError where one fails.

    Those of bfloat16 are not there: the interpreter has no such numbers.
    """
    # In a process of its own: the variable must be set before the kernels are decorated.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "triton-", "-vv",
         str(HERE / tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return Counter(re.findall(r"triton-torch\.(\w+)[-\w., ]*\] PASSED", done.stdout))


def compile_kernel(kernel, types: dict[str, str], constants: dict, arch: int, options=None, aligned=None):
    """`types`: of what is neither a constant nor a size; `options`: None for those that most kernels have;
    `aligned`: the arguments that are multiples of 16, None for all pointers and sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mnp_fast.ops.triton_common import OPTIONS

    types = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    if aligned is None:
        # Torch's allocations are aligned, and so is what the launcher would find for these sizes.
        aligned = [name for name, kind in signature.items() if kind[0] in "*i"]
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options or OPTIONS)
