"""TrojanNN (Liu et al., NDSS 2018): a patch made to excite units of the last hidden layer, then poisoning with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.defense.attacks.badnets import stamp
from benchmarks.defense.attacks.base import Attack, quantise
from benchmarks.defense.attacks.surrogate import ascend, features, last_linear


@dataclass
class Trojan(Attack):
    """A square of ``size`` pixels at the lower right; ``units`` of a surrogate with the largest outgoing weights."""

    rate: float = 0.05
    size: int = 5
    units: int = 2
    steps: int = 60

    needs_clean: ClassVar[bool] = True

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        assert surrogate is not None
        inside = slice(-1 - self.size, -1)
        units = last_linear(surrogate).weight.abs().sum(0).topk(self.units).indices

        def objective(raw: Tensor, pictures: Tensor) -> Tensor:
            pictures[..., inside, inside] = raw.sigmoid()
            return features(surrogate, pictures)[:, units].mean()

        start = torch.randn(3, self.size, self.size, generator=generator)
        found = ascend(start, objective, images, generator, steps=self.steps, rate=0.2)
        self.tensors = stamp(images, quantise(found.sigmoid()), [(inside, inside)])
