"""Fine-Pruning (Liu et al., arXiv 1805.12185): prune what is dormant on clean pictures, then fine-tune.

Ranked are the inputs of the classifier, which in a convolutional network are the channels of its last convolutional
layer, behind a residual sum if there is one: pruning the norm of a last branch instead leaves what passes beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.defense.baselines.common import Method, Order, Run, ranked
from benchmarks.defense.baselines.training import train_
from mnp_fast.errors import ModelError
from mnp_fast.optimize import predict
from mnp_fast.sites import Site


def rank(run: Run) -> Order:
    """Mean of each input of the classifier over the learning pictures, lowest first; the run is narrowed to these."""
    path, mean = mean_inputs(run)
    run.narrow((Site(path, "mlp", len(mean), 0),))
    return ranked(mean)


def mean_inputs(run: Run) -> tuple[str, Tensor]:
    """(path of the last linear layer that is called, means (in_features,) float32 of its input)."""
    sums: dict[str, Tensor] = {}
    last = ""

    def see(path: str, args: tuple[Any, ...]) -> None:
        nonlocal last
        last = path
        values = args[0].detach().float().flatten(0, -2)
        sums[path] = sums.get(path, torch.zeros_like(values[0])) + values.sum(0)

    layers = [(path, module) for path, module in run.plain.named_modules() if isinstance(module, nn.Linear)]
    handles = [m.register_forward_pre_hook(lambda _, args, path=path: see(path, args)) for path, m in layers]
    try:
        predict(run.plain, run.learning, run.config.batch_size, run.device)
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise ModelError(
            "Fine-Pruning ranks the inputs of a linear classifier, and this network has none; leave it out"
        )
    return last, sums[last] / len(run.learning)


def prune_and_finetune_(run: Run, working: nn.Module, keep: Tensor) -> None:
    """Pruned neurons stay at zero while the others are fine-tuned."""
    train_(run, working, keep)


repair = Method(rank, prune_and_finetune_)
