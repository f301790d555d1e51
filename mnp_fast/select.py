"""Which neurons are pruned: how far to go along the order of the masks, from clean pictures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

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
    how: Execution = MODULES,
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
    kept = torch.ones_like(mask)

    def cut(count: int) -> None:
        kept.fill_(1.0)
        kept[order[:count]] = 0.0

    with ExitStack() as stack:
        stack.enter_context(masked(model, sites, kept, how=how))
        if suspected_target is not None:
            stack.enter_context(masked(suppressed, sites, kept, batch_statistics=True, how=how))
        both = (held, learning)
        before = [torch.cat(list(_right(model, data, mask.device))) for data in both]

        def dearer(limit: float, count: int) -> bool:
            cut(count)
            now = (right for data in both for right in _right(model, data, mask.device))
            return drop_above(limit, before, now)

        def let_go(count: int) -> bool:
            cut(count)
            seen, there, allowed = 0, 0, config.release_share * len(learning)
            # One size of batch for learning and selecting: batch statistics depend on it.
            for logits in predictions(suppressed, learning, config.batch_size, mask.device):
                seen += len(logits)
                there += int(logits.argmax(1).eq(suspected_target or 0).sum())
                if there > allowed or there + len(learning) - seen <= allowed:
                    break
            return there <= allowed

        return _sets(mask, order, suspected_target, candidates, config, dearer, let_go)


def _sets(
    mask: Tensor,
    order: Tensor,
    suspected_target: int | None,
    candidates: int,
    config: PruneConfig,
    dearer: Callable[[float, int], bool],
    let_go: Callable[[int], bool],
) -> tuple[Selection, ...]:
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


def _right(network: nn.Module, data: DefenceSet, device: torch.device) -> Iterator[Tensor]:
    """Bool (b,) for each batch: right or wrong."""
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
