"""Where and in which modes a run computes, in which precision its products are, and the memory that it took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from mnp_fast.errors import ConfigError
from mnp_fast.ops.cpu_backend import usable_isas


def compute_device(given: torch.device | str) -> torch.device:
    """The device of that name, after a trial. ConfigError where nothing can be computed there."""
    try:
        device = torch.device(given)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device).item()
    except Exception as error:  # an unknown word, a backend not built in and a failing driver all raise differently
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the device {given!r} cannot be used ({first}); give cpu, or a device that is there"
        ) from error
    return device


def product_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """torch.bfloat16 where products are to run in it, None for float32. "auto": where the device has such products."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and "avx512_bf16" in usable_isas() else None


def peak_mb(device: torch.device) -> float:
    """Peak memory in MB: of the stage on a GPU, of the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, float32 and the CPU where nothing else is said, whatever the
    caller has set."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with ExitStack() as modes:
            if torch.get_default_device().type != "cpu":
                # Not set_default_device, which does not leave a `with torch.device(...)` of the caller.
                modes.enter_context(torch.device("cpu"))
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
