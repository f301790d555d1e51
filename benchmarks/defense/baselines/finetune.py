"""Plain fine-tuning on the defence set: the baseline of baselines (BackdoorBench, arXiv 2206.12654, "FT")."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.defense.baselines.common import Method, Run
from benchmarks.defense.baselines.training import train_


def finetune_(run: Run, working: nn.Module, keep: Tensor) -> None:
    """All weights, nothing pruned."""
    train_(run, working)


repair = Method(rank=None, restore_=finetune_)
