"""The CUDA sources without a GPU: every kernel file compiles for every architecture that is built by default."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mnp_fast import settings

ROOT = Path(__file__).resolve().parents[2]
# Off is the remedy for an nvcc that cannot build this.
OFF = settings.read("MNP_FAST_CUDA") == "off"
NVCC = None if OFF else os.environ.get("CUDACXX") or shutil.which("nvcc")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = settings.VARIABLES["MNP_FAST_CUDA_ARCHS"].default.split(";")


def test_there_are_sources():
    # On a GPU convolutions are cuDNN's.
    cpu_alone = {"isa", "winograd"}
    kernels = sorted(p.stem for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if p.stem not in cpu_alone)
    assert [source.stem for source in SOURCES] == kernels


@pytest.mark.skipif(NVCC is None, reason="no nvcc: put it on PATH, or set CUDACXX")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles(source, arch, tmp_path):
    command = [NVCC, "-std=c++17", "-I", str(ROOT / "csrc"), f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", "-o", str(tmp_path / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A kernel bound by memory must not send its own registers there.
    spills = [line for line in done.stderr.splitlines() if "spill" in line and " 0 bytes spill stores" not in line]
    assert not spills, spills
