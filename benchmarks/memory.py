"""Peak memory of one call, over what stood before it, and what stays allocated after it.

CUDA: of torch.cuda.memory_allocated, less what it was before. CPU: sums of live tensor memory, from the allocations and
releases that torch's profiler records; unlike the resident size of the process they do not depend on what other
providers of the process have used before, and have the bytes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch


def peak_mb(call: Callable[[], Any], device: torch.device) -> float:
    """Megabytes (1e6 bytes) that the call holds at most beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before) / 1e6
    return max(_live(call)) / 1e6


def held_mb(call: Callable[[], Any], device: torch.device) -> float:
    """Megabytes that are allocated after the call beyond what was before it, what it returns being alive."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        made = call()
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device) - before
        del made
        return float(held) / 1e6
    return _live(call)[-1] / 1e6


def _live(call: Callable[[], Any]) -> list[int]:
    """Bytes that are live, beyond those before the call, after each allocation and release in it; 0 at first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    threads = torch.get_num_threads()
    # The profiler sees this thread alone. With one core the step of mnp_fast has no others; with more each holds a part
    # of what this one holds here.
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            made = call()
    finally:
        torch.set_num_threads(threads)
    del made
    results: Any = profile.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return list(accumulate((e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())), initial=0))
