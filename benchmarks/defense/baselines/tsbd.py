"""TSBD (Lin et al., arXiv 2405.20291): what changes most when clean pictures are unlearned carries the backdoor.

Stage 1 orders neurons by the L1 change of their weights under clean unlearning, and sets the most changed weights of
the first of them to zero: of as many as `BUDGET` allows after that (the paper: a fixed share). Stage 2 fine-tunes while
it holds the norm of the gradient down, since backdoored networks learn with larger gradients. Channels of shortcut
convolutions are neurons here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.defense.baselines.common import BUDGET, Method, Order, Run, filters, ranked
from benchmarks.defense.baselines.training import TINY, Loss, moved_gradients, plain_gradients, train_
from mnp_fast.select import drop_above, right_answers, smallest
from mnp_fast.sites import Site

WEIGHTS = 0.7
"""Share of the weights of all chosen neurons together that are set to zero, the most changed."""
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
    """Set the most changed `WEIGHTS` of the neurons that are not kept to zero, in place."""
    chosen = []
    for site in run.sites:
        gone = ~keep[site.offset : site.offset + site.neurons]
        chosen += [(weight, rows[gone], change[gone]) for weight, rows, change in _changes(run, working, site)]
    pooled = torch.cat([change.flatten() for _, _, change in chosen])
    count = round(WEIGHTS * len(pooled))
    if not count:
        return
    least = pooled.kthvalue(len(pooled) - count + 1).values
    for weight, rows, change in chosen:
        flat = weight[rows].flatten(1).masked_fill(change >= least, 0.0)
        weight[rows] = flat.view(-1, *rows.shape[1:], *weight.shape[1:])


def rule(run: Run, ranking: Order) -> Tensor:
    """keep (neurons,) bool, as `Run.affordable`, but with accuracy measured after the reset."""
    both = (run.held, run.learning)

    def kept(count: int) -> Tensor:
        keep = torch.ones(run.neurons, dtype=torch.bool, device=run.device)
        keep[ranking[1][:count]] = False
        return keep

    def dearer(count: int) -> bool:
        working = run.working_copy()
        reset_(run, working, kept(count))
        return drop_above(
            BUDGET, before, (right for data in both for right in right_answers(working, data, run.device))
        )

    before = [torch.cat(list(right_answers(run.plain, data, run.device))) for data in both]
    return kept(max(smallest(dearer, run.neurons) - 1, 0))


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


repair = Method(rank, restore_, rule)
