"""The loops of the baselines: training of weights, with any rule for the gradient, and projected steps of masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.defense.baselines.common import Run
from mnp_fast.data import DefenceSet, logits_of
from mnp_fast.masked import masked, prune_
from mnp_fast.ops import mask_step_

EPOCHS = 50
RATE = 0.01
"""Of fine-tuning, annealed to 0 by a cosine, as in BackdoorBench; it has 100 epochs, over 2,500 pictures."""
MOMENTUM = 0.9
TINY = 1e-12
"""Least length that a gradient is divided by."""

Loss = Callable[[], Tensor]
Gradients = Callable[[Loss, Sequence[Tensor]], Sequence[Tensor]]


def plain_gradients(loss: Loss, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Those of the loss where the weights are."""
    return torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)


@torch.no_grad()
def moved_gradients(loss: Loss, parameters: Sequence[Tensor], steps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Those where the weights would be after ``steps``; the weights are what they were, bit for bit."""
    before = [parameter.clone() for parameter in parameters]
    torch._foreach_add_(list(parameters), list(steps))
    with torch.enable_grad():
        found = plain_gradients(loss, parameters)
    torch._foreach_copy_(list(parameters), before)
    return found


def train_(
    run: Run,
    model: nn.Module,
    keep: Tensor | None = None,
    gradients: Gradients = plain_gradients,
    label_smoothing: float = 0.0,
) -> None:
    """Train the model in place on the learning pictures: SGD with momentum, weight decay and cosine annealing.

    BatchNorm normalises with the statistics of the batch, as in training; its running statistics are taken anew from
    the learning pictures at the end. Dropout is off and pictures are not augmented, as everywhere in mnp_fast.
    keep: (neurons,) bool, the others are held at zero. gradients: of a loss in the parameters.
    """
    parameters = list(model.parameters())
    config = run.config
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=config.weight_decay)
    steps = EPOCHS * math.ceil(len(run.learning) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with masked(model, (), None, batch_statistics=True, how=run.how):
        for _ in range(EPOCHS):
            for images, labels in run.learning.batches(config.batch_size, run.generator, run.device):

                def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    return F.cross_entropy(logits_of(model(images)).float(), labels, label_smoothing=label_smoothing)

                for parameter, gradient in zip(parameters, gradients(loss, parameters), strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
                if keep is not None:
                    prune_(model, run.sites, keep)
    renew_statistics_(model, run.learning, config.batch_size)


@torch.no_grad()
def renew_statistics_(model: nn.Module, data: DefenceSet, batch_size: int) -> None:
    """Running statistics of every BatchNorm as the mean over batches of ``data``; the model is in eval mode after."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.training = True
    if norms:
        # A generator, since batches then have two pictures or more.
        for images, _ in data.batches(batch_size, torch.Generator().manual_seed(0)):
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.training = False


def learn_mask(
    run: Run,
    model: nn.Module,
    steps: int,
    rate: float,
    gradient: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Masks of the model from one down, by projected SGD with momentum on [0, 1]; batch statistics in BatchNorm.

    gradient(at, mask): the step's; ``at`` gives the gradient of the batch's cross-entropy at any mask (neurons,).
    Returns (mask, order): the lowest mask first, equal ones such as zeros by how hard the loss presses them down.
    """
    mask = torch.ones(run.neurons, device=run.device)
    momentum, nothing = torch.zeros_like(mask), torch.zeros_like(mask)
    point = torch.ones_like(mask, requires_grad=True)
    batches = partial(run.learning.batches, run.config.batch_size, run.generator, run.device)
    passes = chain.from_iterable(batches() for _ in repeat(None))
    with masked(model, run.sites, point, batch_statistics=True, how=run.how):
        for images, labels in (next(passes) for _ in range(steps)):

            def at(where: Tensor, images: Tensor = images, labels: Tensor = labels) -> Tensor:
                point.detach().copy_(where)
                return torch.autograd.grad(F.cross_entropy(logits_of(model(images)).float(), labels), point)[0]

            mask_step_(mask, momentum, gradient(at, mask), nothing, rate=rate, decay=MOMENTUM, penalty=0.0)
    pressed = momentum.argsort(descending=True, stable=True)
    return mask, pressed[mask[pressed].argsort(stable=True)]
