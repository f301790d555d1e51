"""Wall time of several calls that are compared with each other: taken in turns, so that drift hits all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` in [0, 1] of ``values`` lies, linear between neighbours; ValueError for none."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(times_ms: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, as they stand in a row of results."""
    shares = {"median_ms": 0.5, "p20_ms": 0.2, "p80_ms": 0.8}
    return {name: float(f"{percentile(times_ms, share):.5g}") for name, share in shares.items()}


def elapsed_ms(call: Call, device: torch.device, times: int = 1) -> float:
    """Milliseconds of one call, over ``times`` calls in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / times
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) * 1e3 / times


def interleaved(
    calls: Mapping[str, Call],
    repeats: int,
    device: torch.device,
    *,
    sample_ms: float = 0.0,
    settle: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds a call, ``repeats`` samples of each, all calls in turns.

    Every call runs twice before. A sample is one call, or as many as fill ``sample_ms``. Each round begins with another
    call, so that none always follows the same one. settle: every turn begins with a call that is not timed.
    """
    inner = {}
    for name, call in calls.items():
        elapsed_ms(call, device)
        inner[name] = max(1, math.ceil(sample_ms / max(elapsed_ms(call, device), 1e-4)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(repeats):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                if settle:
                    elapsed_ms(calls[name], device)
                times[name].append(elapsed_ms(calls[name], device, inner[name]))
    finally:
        if collecting:
            gc.enable()
    return times
