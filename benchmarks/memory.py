"""Peak memory of one call, over what stood before it.

CUDA: torch.cuda.max_memory_allocated during the call, less what was allocated before. CPU: the highest sum of live
tensor memory, from the allocations and releases that torch's profiler records; unlike the resident size of the process
it does not depend on what other providers of the process have used before, and it has the bytes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
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
    live, peak = 0, 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 1e6
