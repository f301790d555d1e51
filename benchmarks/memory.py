"""Peak memory of one call, over what stood before it, and what stays allocated after it.

CUDA: of torch.cuda.memory_allocated, less what it was before. CPU, peak: the highest sum of live tensor memory, from
the allocations and releases that torch's profiler records; unlike the resident size of the process it does not depend
on what other providers of the process have used before, and it has the bytes exactly. CPU, held: the growth of the
resident size, free memory given back before and after; what the profiler sees of weights packed by oneDNN is not right.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
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
    activities = [torch.profiler.ProfilerActivity.CPU]
    threads = torch.get_num_threads()
    # The profiler sees this thread alone. With one core the step of mnp_fast has no others; with more each holds a part
    # of what this one holds here.
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call()
    finally:
        torch.set_num_threads(threads)
    results: Any = profile.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())), initial=0)) / 1e6


def held_mb(make: Callable[[], Any], device: torch.device, drop: Callable[[Any], None] = lambda made: None) -> float:
    """Megabytes that are allocated beyond what was before while what ``make`` returns lives; ``drop`` gives it back.

    On a CPU the second time, so that code and tables that are loaded once do not count; on Linux alone.
    """
    if device.type == "cpu":
        drop(make())
    before = _allocated(device)
    made = make()
    held = _allocated(device) - before
    drop(made)
    return held / 1e6


def _allocated(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
