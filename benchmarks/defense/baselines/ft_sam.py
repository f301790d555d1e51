"""FT-SAM (Zhu et al., arXiv 2304.11823): fine-tuning with adaptive sharpness-aware minimisation.

The gradient is taken at w + e, e = rho T^2 g / |T g|, T = |w| elementwise (arXiv 2102.11600): the larger a weight, the
further it is moved, since neurons of a backdoor have large weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.defense.baselines.common import Method, Run
from benchmarks.defense.baselines.training import TINY, Loss, moved_gradients, plain_gradients, train_

RHO = 2.0
SMOOTHING = 0.1
"""Radius and label smoothing on CIFAR-10 in BackdoorBench, which is by the paper's authors."""


def sharpness_aware(loss: Loss, parameters: Sequence[Tensor], rho: float = RHO) -> Sequence[Tensor]:
    """Gradients at the worst point of the ellipsoid |e / w| <= rho around the weights, to first order."""
    first = plain_gradients(loss, parameters)
    scales = [parameter.detach().abs() for parameter in parameters]
    length = torch.nn.utils.get_total_norm([s * g for s, g in zip(scales, first, strict=True)]).clamp_min(TINY)
    steps = [rho * s * s * g / length for s, g in zip(scales, first, strict=True)]
    return moved_gradients(loss, parameters, steps)


def finetune_(run: Run, working: nn.Module, keep: Tensor) -> None:
    """All weights, nothing pruned."""
    train_(run, working, gradients=sharpness_aware, label_smoothing=SMOOTHING)


repair = Method(rank=None, restore_=finetune_)
