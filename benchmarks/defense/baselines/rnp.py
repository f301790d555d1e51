"""RNP (Li et al., arXiv 2305.14876): unlearn the clean function, then recover it with masks; what falls is pruned."""

from __future__ import annotations

from benchmarks.defense.baselines.common import Method, Order, Run
from benchmarks.defense.baselines.training import learn_mask

RATE, ALPHA = 0.2, 0.2
"""Learning rate of the masks, and what the loss is multiplied by, as in BackdoorBench."""
STEPS = 80
"""20 passes over 500 pictures, as in the paper."""


def rank(run: Run) -> Order:
    """Masks that recover the unlearned model, lowest first."""
    return learn_mask(run, run.unlearned, STEPS, RATE, lambda at, mask: ALPHA * at(mask))


repair = Method(rank)
