"""Fine-Pruning (Liu et al., arXiv 1805.12185): prune what is dormant on clean pictures, then fine-tune.

Ranked is the last convolutional site alone, by mean activation; where there is none, the last site that can be seen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense.baselines.common import LEAVE, Method, Order, Run
from benchmarks.defense.baselines.training import train_
from mnp_fast.optimize import predict
from mnp_fast.sites import Site


def rank(run: Run) -> Order:
    """Mean activation after a ReLU, of the last convolutional site, over pictures and places."""
    seen = [site for site in run.sites if not site.functional]
    site = ([site for site in seen if site.kind in ("batch_norm", "conv")] or seen or [run.sites[-1]])[-1]
    activation = mean_activation(run, site)
    score = torch.full((run.neurons,), float(LEAVE), device=run.device)
    score[site.offset : site.offset + site.neurons] = activation
    return score, site.offset + activation.argsort(stable=True)


def mean_activation(run: Run, site: Site) -> Tensor:
    """(site.neurons,) float32, over the learning pictures."""
    module = run.plain.get_submodule(site.path)
    total, count = torch.zeros(site.neurons, device=run.device), 0

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal total, count
        values = args[0].unflatten(-1, (site.neurons, -1)) if site.kind in ("mlp", "heads") else output.movedim(1, -1)
        values = F.relu(values.detach().float())
        values = values.mean(-1) if site.kind in ("mlp", "heads") else values
        total += values.reshape(-1, site.neurons).sum(0)
        count += values.numel() // site.neurons

    handle = module.register_forward_hook(see)
    try:
        predict(run.plain, run.learning, run.config.batch_size, run.device)
    finally:
        handle.remove()
    return total / max(count, 1)


def prune_and_finetune_(run: Run, working: nn.Module, keep: Tensor) -> None:
    """Pruned neurons stay at zero while the others are fine-tuned."""
    train_(run, working, keep)


repair = Method(rank, prune_and_finetune_)
