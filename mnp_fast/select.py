"""Which neurons are pruned: how far to go along the order of the masks, from clean pictures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import masked
from mnp_fast.optimize import predict
from mnp_fast.sites import Site


@dataclass(frozen=True)
class Selection:
    """keep: (neurons,) bool. threshold: t, masks <= t are pruned, -1 where none is. exposed: neurons after which the
    suppressed model is no worse than chance; affordable: neurons after which the budget is spent."""

    keep: Tensor
    threshold: float
    exposed: int
    affordable: int


def select(
    mask: Tensor,
    order: Tensor,
    model: nn.Module,
    suppressed: nn.Module,
    sites: Sequence[Site],
    learning: DefenceSet,
    held: DefenceSet,
    config: PruneConfig,
) -> Selection:
    """The prune set, along ``order`` as `learn_masks` gives it: nested sets, searched by bisection.

    Pruning goes on until the suppressed model's clean loss has come down to that of chance, ln(classes): what made it
    wrong, the backdoor, is then gone. It stops earlier where held-back accuracy has fallen by more than the budget,
    judged by a one-sided bound of one standard error of the paired difference.
    """
    candidates = int((mask < 1).sum())
    labels = held.labels

    def logits(network: nn.Module, data: DefenceSet, count: int, batch_statistics: bool) -> Tensor:
        kept = torch.ones_like(mask)
        kept[order[:count]] = 0
        with masked(network, sites, kept, batch_statistics=batch_statistics):
            # One size of batch for learning and selecting: batch statistics depend on it.
            return predict(network, data, config.batch_size, mask.device)

    def exposed(count: int) -> bool:
        out = logits(suppressed, learning, count, True)
        return float(F.cross_entropy(out, learning.labels)) <= config.exposure_stop * math.log(out.shape[1])

    right = logits(model, held, 0, False).argmax(1) == labels

    def too_dear(count: int) -> bool:
        now = logits(model, held, count, False).argmax(1) == labels
        return paired_drop(right, now)[0] - paired_drop(right, now)[1] > config.accuracy_budget

    enough = _first(exposed, candidates)
    dear = _first(too_dear, candidates)
    count = min(enough, dear - 1, candidates)
    keep = torch.ones_like(mask, dtype=torch.bool)
    keep[order[:count]] = False
    threshold = float(mask[order[count - 1]]) if count else -1.0
    return Selection(keep, threshold, min(enough, candidates), min(dear - 1, candidates))


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
