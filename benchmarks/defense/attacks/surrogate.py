"""What attacks do with a clean network: make a trigger by gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def last_linear(model: nn.Module) -> nn.Linear:
    """The classifier: the linear layer that was registered last."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return layers[-1]


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier takes, (b, features)."""
    taken: list[Tensor] = []
    handle = last_linear(model).register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return taken[0]


def ascend(
    variable: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    rate: float,
    batch: int = 32,
) -> Tensor:
    """Adam from `variable` up the `objective` (variable, pictures in [0, 1]) on batches of `images`, uint8.

    What is found is on the device of the images.
    """
    variable = variable.to(images.device, copy=True).requires_grad_()
    optimizer = torch.optim.Adam([variable], rate, maximize=True)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator).to(images.device)
        value = objective(variable, images[rows].float() / 255)
        (variable.grad,) = torch.autograd.grad(value, variable)
        optimizer.step()
    return variable.detach()
