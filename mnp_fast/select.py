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
    """One prune set. keep: (neurons,) bool. threshold: t, the highest mask that is pruned, -1 where none is.

    Counts along the order: ``low``, masks at or below the configured threshold; ``affordable``, neurons that accuracy
    before fine-tuning allows; ``released``, neurons after which the suppressed model has let go of the suspected class
    (None: not looked for, or never).
    """

    keep: Tensor
    threshold: float
    low: int
    affordable: int
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
) -> tuple[Selection, ...]:
    """The prune sets worth fine-tuning, the boldest first; the last is to be taken where those before cost too much.

    Sets are nested along ``order`` as `learn_masks` gives it and searched by bisection. Low masks are pruned. Without a
    suspected target they are only while that costs next to no accuracy. With one, pruning goes on until the suppressed
    model lets go of the suspected class, since the pull of the backdoor is then gone. Where that costs more than the
    accuracy limit it is a bold set, to be judged after fine-tuning, with a modest one behind it: the low masks, or as
    many neurons as an accuracy budget allows. Limit and budget hold for the held-back pictures and for all pictures, by
    the paired drop less one standard error: a hundred held-back pictures alone let 9 points pass for 4.
    """
    candidates = int((mask < 1).sum())

    def logits(network: nn.Module, data: DefenceSet, count: int, batch_statistics: bool) -> Tensor:
        kept = torch.ones_like(mask)
        kept[order[:count]] = 0
        with masked(network, sites, kept, batch_statistics=batch_statistics):
            # One size of batch for learning and selecting: batch statistics depend on it.
            return predict(network, data, config.batch_size, mask.device)

    def right(count: int) -> tuple[Tensor, Tensor]:
        on_held, on_learning = (logits(model, data, count, False).argmax(1) == data.labels for data in (held, learning))
        return on_held, torch.cat([on_held, on_learning])

    unpruned = right(0)

    def dearer(limit: float, count: int) -> bool:
        drops = [paired_drop(was, now) for was, now in zip(unpruned, right(count), strict=True)]
        return any(drop - error > limit for drop, error in drops)

    def let_go(count: int) -> bool:
        predicted = logits(suppressed, learning, count, True).argmax(1)
        return float(predicted.eq(suspected_target or 0).float().mean()) <= config.release_share

    low = int((mask <= config.threshold).sum())
    released = None
    if suspected_target is None:
        affordable = max(_first(partial(dearer, config.unsuspected_limit), low) - 1, 0)
        counts = [min(low, affordable)]
    else:
        affordable = max(_first(partial(dearer, config.accuracy_limit), candidates) - 1, 0)
        first = _first(let_go, candidates)
        released = first if first <= candidates else None
        if released is not None and released <= affordable:
            counts = [min(max(low, released), affordable)]
        else:
            within_budget = max(_first(partial(dearer, config.accuracy_budget), affordable) - 1, 0)
            modest = min(max(low, within_budget), affordable)
            counts = [modest] if released is None else [max(released, modest), modest]

    def selection(count: int) -> Selection:
        keep = torch.ones_like(mask, dtype=torch.bool)
        keep[order[:count]] = False
        threshold = float(mask[order[count - 1]]) if count else -1.0
        return Selection(keep, threshold, low, affordable, released)

    return tuple(selection(count) for count in dict.fromkeys(counts))


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
