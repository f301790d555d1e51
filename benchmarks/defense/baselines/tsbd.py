"""TSBD (Lin et al., arXiv 2405.20291): what changes most when clean pictures are unlearned carries the backdoor.

Stage 1 orders neurons by the L1 change of their weights under clean unlearning; of each that the shared rule takes
(the paper: a fixed share), the most changed weights are set to zero. Stage 2 fine-tunes while it holds the norm of the
gradient down, since backdoored networks learn with larger gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.defense.baselines.common import Method, Order, Run, filters, ranked
from benchmarks.defense.baselines.training import TINY, Loss, moved_gradients, plain_gradients, train_
from mnp_fast.sites import Site

WEIGHTS = 0.7
"""Share of a chosen neuron's weights that are set to zero, the most changed."""
RADIUS, ALPHA = 0.05, 0.7
"""Of stage 2: (1 - alpha) g(w) + alpha g(w + radius g / |g|), after arXiv 2202.03599. All three are the authors'."""


def rank(run: Run) -> Order:
    """The most changed first: a score is minus the change."""
    score = torch.zeros(run.neurons, device=run.device)
    for site in run.sites:
        changes = torch.cat([change for _, _, change in _changes(run, run.plain, site)], 1)
        score[site.offset : site.offset + site.neurons] = -changes.sum(1)
    return ranked(score)


@torch.no_grad()
def reset_(run: Run, working: nn.Module, keep: Tensor) -> None:
    """Set the most changed `WEIGHTS` of the neurons that are not kept to zero."""
    for site in run.sites:
        gone = ~keep[site.offset : site.offset + site.neurons]
        for weight, rows, change in _changes(run, working, site):
            count = round(WEIGHTS * change.shape[1])
            flat = weight[rows[gone]].flatten(1)
            flat.scatter_(1, change[gone].topk(count).indices, 0.0)
            weight[rows[gone]] = flat.view(-1, *rows.shape[1:], *weight.shape[1:])


@torch.no_grad()
def _changes(run: Run, model: nn.Module, site: Site) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(weight of ``model``, its rows (neurons, k), change under unlearning (neurons, weights)) for each source."""
    both = (filters(model, site), filters(run.plain, site), filters(run.unlearned, site))
    for (weight, rows), (before, _), (after, _) in zip(*both, strict=True):
        yield weight, rows, (after - before).abs()[rows].flatten(1)


def activeness_aware(loss: Loss, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients of the loss plus a multiple of its gradient's norm, to first order."""
    first = plain_gradients(loss, parameters)
    length = torch.nn.utils.get_total_norm(first).clamp_min(TINY)
    second = moved_gradients(loss, parameters, [RADIUS * g / length for g in first])
    return [(1 - ALPHA) * g + ALPHA * moved for g, moved in zip(first, second, strict=True)]


def restore_(run: Run, working: nn.Module, keep: Tensor) -> None:
    """Both stages. What was set to zero is trained again, as in the paper."""
    reset_(run, working, keep)
    train_(run, working, gradients=activeness_aware)


repair = Method(rank, restore_)
