"""MNP (Li, Jiang, Yi, arXiv 2405.17750): `mnp_fast.prune` as a user would call it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor, nn

import mnp_fast
from benchmarks.defense.baselines.common import Repair
from mnp_fast import run
from mnp_fast.data import DefenceSet
from mnp_fast.ops import channel_magnitude
from mnp_fast.sites import Site, site_parameter, total_neurons


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


# ---------------------------------------------------------------- ablations: what the penalty weighs neurons by
def repair_by_l2(
    model: nn.Module, data: DefenceSet, seed: int = 0, config: mnp_fast.PruneConfig | None = None
) -> Repair:
    """MNP with L2 norms for magnitudes."""
    return _with(_l2, model, data, seed, config)


def repair_unweighted(
    model: nn.Module, data: DefenceSet, seed: int = 0, config: mnp_fast.PruneConfig | None = None
) -> Repair:
    """MNP with one penalty for all neurons, whatever their magnitude."""
    return _with(_ones, model, data, seed, config)


def _with(
    magnitude: Callable[[nn.Module, Sequence[Site]], Tensor],
    model: nn.Module,
    data: DefenceSet,
    seed: int,
    config: mnp_fast.PruneConfig | None,
) -> Repair:
    with mock.patch.object(run, "magnitude", magnitude):
        return repair(model, data, seed, config)


def _l2(model: nn.Module, sites: Sequence[Site]) -> Tensor:
    """L2 norm of each neuron's filter over their mean; of convolutions and linear layers that sites name."""
    parts = []
    for site in sites:
        squares = [
            channel_magnitude([site_parameter(model, source.path, source.parameter)[1].detach()])[1].square()[
                torch.as_tensor(source.rows)
            ]
            for source in site.sources
        ]
        parts.append(torch.stack([square.view(site.neurons, -1).sum(1) for square in squares]).sum(0).sqrt())
    norms = torch.cat(parts)
    return norms / norms.mean()


def _ones(model: nn.Module, sites: Sequence[Site]) -> Tensor:
    return torch.ones(total_neurons(sites), device=next(model.parameters()).device)
