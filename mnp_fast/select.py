"""Which neurons are pruned: how far to go along the order of the masks, from clean pictures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import masked
from mnp_fast.optimize import predict
from mnp_fast.sites import Site


@dataclass(frozen=True)
class Selection:
    """keep: (neurons,) bool. threshold: t, masks <= t are pruned, -1 where none is.

    Counts along the order: ``within_budget`` and ``within_limit``, neurons that accuracy allows; ``released``, neurons
    after which the suppressed model has let go of the suspected class (None: not looked for, or never).
    """

    keep: Tensor
    threshold: float
    within_budget: int
    within_limit: int
    released: int | None


def select(
    mask: Tensor,
    order: Tensor,
    model: nn.Module,
    suppressed: nn.Module,
    sites: Sequence[Site],
    learning: DefenceSet,
    held: DefenceSet,
    suspected_target: int | None,
    config: PruneConfig,
) -> Selection:
    """The prune set, along ``order`` as `learn_masks` gives it: nested sets, searched by bisection.

    Without a suspected target only what costs no held-back accuracy is pruned. With one, pruning goes on to the
    accuracy budget, and past it, up to the accuracy limit, where that makes the suppressed model let go of the
    suspected class: the pull of the backdoor is then gone, and fine-tuning brings the accuracy back. Accuracy is
    compared by the paired drop less one standard error, since a hundred held-back pictures are few.
    """
    candidates = int((mask < 1).sum())

    def logits(network: nn.Module, data: DefenceSet, count: int, batch_statistics: bool) -> Tensor:
        kept = torch.ones_like(mask)
        kept[order[:count]] = 0
        with masked(network, sites, kept, batch_statistics=batch_statistics):
            # One size of batch for learning and selecting: batch statistics depend on it.
            return predict(network, data, config.batch_size, mask.device)

    right = logits(model, held, 0, False).argmax(1) == held.labels

    def dearer(budget: float, count: int) -> bool:
        drop, error = paired_drop(right, logits(model, held, count, False).argmax(1) == held.labels)
        return drop - error > budget

    def let_go(count: int) -> bool:
        predicted = logits(suppressed, learning, count, True).argmax(1)
        return float(predicted.eq(suspected_target or 0).float().mean()) <= config.release_share

    budget = config.accuracy_budget if suspected_target is not None else 0.0
    within_budget = within_limit = _first(partial(dearer, budget), candidates) - 1
    released = None
    if suspected_target is not None:
        within_limit = max(within_budget, _first(partial(dearer, config.accuracy_limit), candidates) - 1)
        first = _first(let_go, within_limit)
        released = first if first <= within_limit else None
    count = max(within_budget, released or 0, 0)
    keep = torch.ones_like(mask, dtype=torch.bool)
    keep[order[:count]] = False
    threshold = float(mask[order[count - 1]]) if count else -1.0
    return Selection(keep, threshold, max(within_budget, 0), max(within_limit, 0), released)


def paired_drop(before: Tensor, after: Tensor) -> tuple[float, float]:
    """(drop, standard error) of accuracy between two runs on the same pictures; bool (n,) each, right or wrong.

    The error is that of a paired difference (McNemar): pictures that both get right or wrong add no noise.
    """
    n = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    drop = (lost - won) / n
    return drop, math.sqrt(max(lost + won - n * drop * drop, 0.0)) / n


def _first(holds: Callable[[int], bool], last: int) -> int:
    """Smallest count in [0, last] at which ``holds``, by bisection; last + 1 where it does not hold at ``last``."""
    low, high = 0, last + 1
    while low < high:
        middle = (low + high) // 2
        if middle > last or holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
