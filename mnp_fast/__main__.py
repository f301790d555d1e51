"""`python -m mnp_fast`: versions, what can run here and why the rest cannot, and the settings in force."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch

from mnp_fast import settings
from mnp_fast.ops import BACKENDS, cpu_backend, native, why_not

_OP = "masked_affine"


def main(arguments: Sequence[str]) -> int:
    if arguments:
        print("python -m mnp_fast only tells what can run here; repair and scan with mnp-fast", file=sys.stderr)
        return 2
    for title, section in (
        ("versions", _versions),
        ("devices", _devices),
        ("native build", _build),
        ("backends", _backends),
        ("settings", _settings),
    ):
        print(f"{title}:")
        try:
            for line in section():
                print(f"  {line}")
        except BrokenPipeError:
            raise
        except Exception as error:  # a diagnosis goes on past whatever is broken
            print(f"  cannot be told: {type(error).__name__}: {error}")
    return 0


def _versions() -> Iterator[str]:
    for package in ("mnp_fast", "torch", "triton", "torchvision", "timm", "transformers"):
        try:
            yield f"{package:<14}{metadata.version(package)}"
        except metadata.PackageNotFoundError:
            yield f"{package:<14}not installed"
    yield f"{'python':<14}{platform.python_version()} on {platform.platform()}"


def _devices() -> Iterator[str]:
    yield f"CPU: {platform.machine()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield f"CUDA: torch finds no device (torch is built {built})"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"CUDA {index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _build() -> Iterator[str]:
    problem = native.info_problem()
    if problem is not None:
        yield f"{problem}; without it there are no CPU kernels"
        return
    info = native.build_info()
    yield f"compiler: {info['compiler']}, beside torch {info['torch']}, for torch {info['torch_target']} and newer"
    usable = cpu_backend.usable_isas()
    yield f"CPU instruction sets: built {info['cpu_isas']}; usable here {' '.join(usable)}; best {usable[-1]}"
    if info["cuda"]:
        archs = " ".join(f"sm_{arch}" for arch in info["cuda_archs"].split())
        yield f"CUDA: toolkit {info['cuda']}, native code for {archs}, PTX of the newest"
    else:
        yield f"CUDA: not built ({info['cuda_reason']})"


def _backends() -> Iterator[str]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for backend in BACKENDS:
        # The backends of a GPU say what they miss also where there is none.
        for device in ["cuda"] if backend in ("cuda", "triton") else devices if backend == "reference" else ["cpu"]:
            reason = why_not(backend, _OP, torch.device(device), torch.float32)
            yield f"{backend:<10} on {device:<5} {'available' if reason is None else f'not available: {reason}'}"


def _settings() -> Iterator[str]:
    for name, value, meaning in settings.describe():
        yield f"{name}={value}  ({meaning})"


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
