"""What a measurement was made on: part of every results file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import mnp_fast

_PACKAGES = ("triton", "torchvision", "timm")


def environment(device: str | None = None, threads: Sequence[int] | None = None) -> dict[str, Any]:
    """Processor or GPU, threads and versions. Equal for two runs that may stand in one results file.

    device: "cpu" or "cuda" (default: cuda where there is one). threads: the numbers of threads that rows were measured
    with (default: torch's present one).
    """
    gpu = torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else ""
    used: Sequence[int] = threads or [torch.get_num_threads()]
    found: dict[str, Any] = {
        "device": gpu or _processor(),
        "cpu": _processor(),
        "threads": used[0] if len(used) == 1 else list(used),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "mnp_fast": mnp_fast.__version__,
        "torch": torch.__version__,
    }
    if gpu:
        found["cuda"] = torch.version.cuda
    found |= {name: version for name in _PACKAGES if (version := _version(name))}
    return found | {"python": platform.python_version(), "system": platform.system()}


@contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, no convolution of float32 is computed in TF32, which is what a GPU does where nobody forbids it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def same_environment(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether rows of the two may be compared: what both tell is equal, save the date."""
    return all(one[key] == other[key] for key in one.keys() & other.keys() if key != "date")


def environment_key(found: Mapping[str, Any]) -> str:
    """Name of a results file: device, threads (where the device is the processor) and torch."""
    parts = [str(found["device"])]
    if found["device"] == found["cpu"]:
        threads = found["threads"] if isinstance(found["threads"], list) else [found["threads"]]
        parts.append(f"{'-'.join(map(str, threads))} threads")
    parts.append(f"torch {found['torch'].partition('+')[0]}")
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()
