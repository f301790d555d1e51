"""Blended injection (Chen, Liu, Li, Lu, Song, arXiv 1712.05526): a picture of noise, mixed into the whole picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.defense.attacks.base import Attack


@dataclass
class Blended(Attack):
    """``strength`` of the noise, the rest of the picture."""

    strength: float = 0.2

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        noise = torch.rand(images.shape[1:], generator=generator)
        self.tensors = {"keep": torch.tensor(1 - self.strength), "add": self.strength * noise}
