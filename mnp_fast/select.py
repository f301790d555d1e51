"""Which neurons are pruned: how far to go along the order of the masks, from clean pictures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import MODULES, Execution, masked
from mnp_fast.optimize import predictions
from mnp_fast.sites import Site

_BATCH = 64
"""Pictures between two looks at whether the answer is certain."""


@dataclass(frozen=True)
class Selection:
    """The prune set. keep: (neurons,) bool. threshold: t, the highest mask that is pruned, -1 where none is.

    low: masks at or below the configured threshold; pruned: those of them that accuracy before fine-tuning allows.
    """

    keep: Tensor
    threshold: float
    low: int
    pruned: int


def select(
    mask: Tensor,
    order: Tensor,
    model: nn.Module,
    sites: Sequence[Site],
    learning: DefenceSet,
    held: DefenceSet,
    limit: float,
    config: PruneConfig,
    how: Execution = MODULES,
) -> Selection:
    """Of the neurons with low masks as many as accuracy allows, along ``order`` as `learn_masks` gives it.

    By bisection. limit: of the drop of accuracy before fine-tuning, which brings much of it back. It holds for the
    held-back pictures and for all pictures, by the paired drop less one standard error: a hundred held-back pictures
    alone let 9 points pass for 4.
    """
    low = int((mask <= config.threshold).sum())
    kept = torch.ones_like(mask)
    with masked(model, sites, kept, how=how):
        both = (held, learning)
        before = [torch.cat(list(right_answers(model, data, mask.device))) for data in both]

        def dearer(count: int) -> bool:
            kept.fill_(1.0)
            kept[order[:count]] = 0.0
            now = (right for data in both for right in right_answers(model, data, mask.device))
            return drop_above(limit, before, now)

        count = max(smallest(dearer, low) - 1, 0)
    keep = torch.ones_like(mask, dtype=torch.bool)
    keep[order[:count]] = False
    return Selection(keep, float(mask[order[count - 1]]) if count else -1.0, low, count)


def right_answers(network: nn.Module, data: DefenceSet, device: torch.device) -> Iterator[Tensor]:
    """Bool (b,) for each batch: right or wrong; computed when asked for."""
    start = 0
    for logits in predictions(network, data, _BATCH, device):
        yield logits.argmax(1) == data.labels[start : start + len(logits)]
        start += len(logits)


def drop_above(limit: float, before: Sequence[Tensor], now: Iterable[Tensor]) -> bool:
    """Whether accuracy drops by more than ``limit`` on the first set of pictures, or on all sets together.

    The drop is the paired one less its standard error. before: bool (n,) for each set, right or wrong; now: the same in
    batches, set after set, read only until the answer is certain whatever the pictures that are left give.
    """
    n = [len(before[0]), sum(len(part) for part in before)]
    was = torch.cat(list(before))
    seen = 0
    lost, won = [0, 0], [0, 0]
    for right in now:
        part = was[seen : seen + len(right)]
        first = slice(0, max(0, n[0] - seen))
        for i, where in enumerate((first, slice(None))):
            lost[i] += int((part[where] & ~right[where]).sum())
            won[i] += int((~part[where] & right[where]).sum())
        seen += len(right)
        best, worst = [], []
        for i in range(2):
            left = was[seen : n[i]]
            could_lose = int(left.sum())
            best.append(_drop(lost[i], won[i] + len(left) - could_lose, n[i]))
            worst.append(_drop(lost[i] + could_lose, won[i], n[i]))
        if any(drop > limit for drop in best):
            return True
        if all(drop <= limit for drop in worst):
            return False
    return False


def _drop(lost: int, won: int, n: int) -> float:
    """Paired drop of accuracy less its standard error; it grows with ``lost`` and falls with ``won``.

    The error is that of a paired difference (McNemar): pictures that both get right or wrong add no noise.
    """
    drop = (lost - won) / n
    return drop - math.sqrt(max(lost + won - n * drop * drop, 0.0)) / n


def smallest(holds: Callable[[int], bool], last: int) -> int:
    """Smallest count in [0, last] at which ``holds``, by bisection; last + 1 where it does not hold at ``last``."""
    low, high = 0, last + 1
    while low < high:
        middle = (low + high) // 2
        if middle > last or holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
