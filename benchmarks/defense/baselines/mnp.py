"""MNP (Li, Jiang, Yi, arXiv 2405.17750): `mnp_fast.prune` as a user would call it."""

from __future__ import annotations

import time

import torch
from torch import nn

import mnp_fast
from benchmarks.defense.baselines.common import Repair
from mnp_fast.data import DefenceSet


def repair(model: nn.Module, data: DefenceSet, seed: int = 0, config: mnp_fast.PruneConfig | None = None) -> Repair:
    """With the same split as the other methods. The order is that of the masks, what was pruned first.

    The result does not tell the order within equal masks, so a test-picked count is not exact inside the zeros.
    """
    start = time.perf_counter()
    result = mnp_fast.prune(model, [(data.images, data.labels)], config, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    assert result.model is not None
    score = torch.cat(list(result.masks.values()))
    gone = torch.cat(
        [torch.zeros(len(m), dtype=torch.bool).index_fill_(0, torch.tensor(result.pruned[path], dtype=torch.long), True)
         for path, m in result.masks.items()]
    )  # fmt: skip
    order = (score - 2 * gone.float()).argsort(stable=True)
    return Repair(
        model=result.model,
        score=score,
        order=order,
        pruned=int(gone.sum()),
        neurons=len(score),
        seconds=seconds,
        stages={entry["stage"]: entry["seconds"] for entry in result.history},
        peak_mb=max(entry["peak_mb"] for entry in result.history),
        verdict=result.verdict,
        suspected_target=result.suspected_target,
        evidence=result.evidence,
    )
