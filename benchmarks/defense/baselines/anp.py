"""ANP (Wu and Wang, arXiv 2110.14430): prune what is sensitive to adversarial perturbations of neurons.

    min over m in [0,1]^N of  a L(m) + (1 - a) max over |d| <= eps of L(m + d)

The perturbation is one step from a random start, as in the paper. It also perturbs the biases; masks here have no entry
for those, so that only the weights are perturbed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.defense.baselines.common import Method, Order, Run
from benchmarks.defense.baselines.training import learn_mask

EPSILON, ALPHA, RATE = 0.4, 0.2, 0.2
"""The paper's."""
STEPS = 300
"""2,000 in the paper; fewer here, since each is three passes."""


def rank(run: Run) -> Order:
    """Masks of the model, lowest first."""

    def gradient(at: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
        start = EPSILON * (2 * torch.rand(run.neurons, generator=run.generator).to(mask.device) - 1)
        worst = (start + EPSILON * at(mask + start).sign()).clamp(-EPSILON, EPSILON)
        return ALPHA * at(mask) + (1 - ALPHA) * at(mask + worst)

    return learn_mask(run, run.plain, STEPS, RATE, gradient)


repair = Method(rank)
