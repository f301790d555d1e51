"""What the tests of the Triton kernels share: the interpreter in its own process, compilation without a GPU."""

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


def passed_in_interpreter(op: str) -> int:
    """How many tests of `op` with Triton pass; fails where one does not."""
    # In a process of its own: the variable must be set before the kernels are decorated.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "triton-",
         str(HERE / f"test_{op}.py")],
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


def compile_kernel(kernel, types: dict[str, str], constants: dict, options: dict, arch: int, aligned=None):
    """`types`: of every argument that is no constant; `aligned`: those that are multiples of 16, None for all."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = types if aligned is None else aligned
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
