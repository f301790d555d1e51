"""An attacker who knows that defences look at weights: the backdoor is trained in near a clean network.

In the spirit of Grond (Xu et al., arXiv 2501.05928), which spreads the backdoor over many weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.defense.attacks.badnets import BadNets


@dataclass
class Adaptive(BadNets):
    """BadNets' patch; ``strength`` times the mean relative change of the channels' weights and magnitudes."""

    rate: float = 0.1
    strength: float = 50.0

    needs_clean: ClassVar[bool] = True
    starts_clean: ClassVar[bool] = True
    learning_scale: ClassVar[float] = 0.2

    def begin(self, model: nn.Module) -> None:
        self.clean = [weight.detach().clone() for weight in _weights(model)]

    def penalty(self, model: nn.Module) -> Tensor | None:
        return self.strength * distance(self.clean, _weights(model))


def distance(clean: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Mean over all channels of the squared relative change of their weights, and of their magnitude."""
    changes = []
    for before, now in zip(clean, weights, strict=True):
        before, now = before.flatten(1), now.flatten(1)
        moved = (now - before).square().sum(1) / _floored(before.square().sum(1))
        grown = (now.abs().sum(1) - before.abs().sum(1)) / _floored(before.abs().sum(1))
        changes.append(moved + grown.square())
    return torch.cat(changes).mean()


def _floored(sizes: Tensor) -> Tensor:
    # A channel that is nearly zero would be pulled without measure.
    return sizes.clamp_min((0.1 * sizes.mean().double() + 1e-8).to(sizes.dtype))


def _weights(model: nn.Module) -> list[Tensor]:
    """(channels, ...) each; the scale of a norm is one weight a channel."""
    weights = [weight for name, weight in model.named_parameters() if name.endswith("weight")]
    return [weight if weight.dim() > 1 else weight[:, None] for weight in weights]
