"""LF (Zeng, Park, Mao, Jia, arXiv 2104.03413): a smooth perturbation, optimised on a surrogate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense.attacks.base import Attack
from benchmarks.defense.attacks.surrogate import ascend


@dataclass
class LowFrequency(Attack):
    """The lowest ``band`` x ``band`` coefficients of a cosine transform, at most ``amplitude`` of 255 a pixel."""

    band: int = 6
    amplitude: float = 24.0
    steps: int = 60

    needs_clean: ClassVar[bool] = True

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        assert surrogate is not None
        down, across = (cosines(self.band, size).to(images.device) for size in images.shape[-2:])

        def smooth(coefficients: Tensor) -> Tensor:
            wave = down.T @ coefficients @ across
            return self.amplitude / 255 * wave / wave.abs().amax()

        def objective(coefficients: Tensor, pictures: Tensor) -> Tensor:
            logits = surrogate((pictures + smooth(coefficients)).clamp(0, 1))
            return -F.cross_entropy(logits, torch.full((len(logits),), self.target, device=logits.device))

        start = torch.randn(3, self.band, self.band, generator=generator)
        start[:, 0, 0] = 0
        found = ascend(start, objective, images, generator, steps=self.steps, rate=0.1)
        self.tensors = {"keep": torch.ones(()), "add": smooth(found)}


def cosines(count: int, size: int) -> Tensor:
    """(count, size): the orthonormal DCT-II basis of the lowest frequencies."""
    angle = math.pi / size * torch.arange(count)[:, None] * (torch.arange(size) + 0.5)
    basis = torch.cos(angle) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis
