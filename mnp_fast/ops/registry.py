"""Which kernels run an op: forced by the caller, or the best that can run for a device and dtype.

A backend is a module with `why_not(device, dtype) -> str | None` (the reason that it cannot run, None if it can) and
one function for every op that it has, named like the op. It is imported when an op first asks for it, never before.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from mnp_fast import settings
from mnp_fast.errors import BackendError, ConfigError
from mnp_fast.ops import native

# Best first: a device has one or two of them. The reference runs everything.
BACKENDS = ("cuda", "cpu", "triton", "reference")
_MODULES = {
    "cuda": "mnp_fast.ops.cuda_backend",
    "triton": "mnp_fast.ops.triton_backend",
    "cpu": "mnp_fast.ops.cpu_backend",
    "reference": "mnp_fast.ops.reference",
}

_forced_backend: str | None = None
_forced_isa: str | None = None


def kernel(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function that runs `op` on tensors of this device and dtype.

    Raises BackendError where a backend is forced that cannot.
    """
    return _kernel(op, _forced_backend or _configured("MNP_FAST_BACKEND"), device, dtype)


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason that a backend cannot run `op` on tensors of this device and dtype; None if it can."""
    module = importlib.import_module(_MODULES[backend])
    reason: str | None = module.why_not(device, dtype)
    if reason is None and not hasattr(module, op):
        reason = f"it has no kernel for {op}"
    return reason


def available(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends that can run `op` on tensors of this device and dtype, best first."""
    return [backend for backend in BACKENDS if why_not(backend, op, device, dtype) is None]


def running(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that the ops run on here, on a CPU with its instruction set: for reports."""
    backend = _forced_backend or _configured("MNP_FAST_BACKEND")
    if backend == "auto":
        backend = next(name for name in BACKENDS if why_not(name, "masked_affine", device, dtype) is None)
    if backend != "cpu":
        return backend
    isa = requested_cpu_isa()
    return f"cpu {importlib.import_module(_MODULES['cpu']).usable_isas()[-1] if isa == 'auto' else isa}"


def beside(op: str, name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """What the backend that runs `op` here has under another name; None where it has nothing of that name."""
    return getattr(sys.modules[kernel(op, device, dtype).__module__], name, None)


@contextmanager
def force_backend(backend: str) -> Iterator[None]:
    """Within it every op runs on this backend, or raises BackendError. For tests and benchmarks; not per thread."""
    global _forced_backend
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} does not exist: choose one of {', '.join(BACKENDS)}")
    before, _forced_backend = _forced_backend, backend
    try:
        yield
    finally:
        _forced_backend = before


@contextmanager
def force_cpu_isa(isa: str) -> Iterator[None]:
    """Within it the CPU kernels use this instruction set, or raise BackendError. For tests; not per thread."""
    global _forced_isa
    before, _forced_isa = _forced_isa, isa
    try:
        yield
    finally:
        _forced_isa = before


def requested_cpu_isa() -> str:
    """The instruction set asked for in code or environment: auto, scalar, avx2, avx512 or avx512_bf16."""
    return _forced_isa or _configured("MNP_FAST_CPU_ISA")


@cache
def _configured(name: str) -> str:
    # Read once: a look at the environment costs more than the choice of a kernel.
    try:
        return settings.read(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@cache
def _kernel(op: str, choice: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    if choice == "auto":
        # One after the other: a backend that is not needed may be broken, or slow to import.
        choice = next(backend for backend in BACKENDS if why_not(backend, op, device, dtype) is None)
        for problem in native.unusable():
            # Python shows equal warnings of one line once.
            warnings.warn(f"mnp_fast: {problem}; until then other kernels run", RuntimeWarning, stacklevel=1)
    else:
        reason = why_not(choice, op, device, dtype)
        if reason is not None:
            raise BackendError(
                f"backend {choice!r} was forced but cannot run {op} on {device} with {dtype}: {reason}. "
                f"Remove MNP_FAST_BACKEND or force_backend to fall back, or see `python -m mnp_fast`."
            )
    function: Callable[..., Any] = getattr(importlib.import_module(_MODULES[choice]), op)
    return function
