"""Defences to compare with, all on mnp_fast's own masked execution; each file names its paper."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from benchmarks.defense.baselines import anp, clp, fine_pruning, finetune, ft_sam, mnp, rnp, tsbd
from benchmarks.defense.baselines.common import Repair
from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet


class Repairs(Protocol):
    """A defence: the caller's model is never changed, the same seed gives the same copy."""

    def __call__(
        self, model: nn.Module, data: DefenceSet, seed: int = 0, config: PruneConfig | None = None
    ) -> Repair: ...


METHODS: dict[str, Repairs] = {
    "mnp": mnp.repair,
    "finetune": finetune.repair,
    "ft_sam": ft_sam.repair,
    "fine_pruning": fine_pruning.repair,
    "anp": anp.repair,
    "rnp": rnp.repair,
    "clp": clp.repair,
    "clp_sigma": clp.repair_by_sigmas,
    "tsbd": tsbd.repair,
}

ABLATIONS: dict[str, Repairs] = {
    "mnp_l2": mnp.repair_by_l2,
    "mnp_unweighted": mnp.repair_unweighted,
}
"""MNP with another magnitude; run only where they are named."""
