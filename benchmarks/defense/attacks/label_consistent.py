"""Label-consistent attack (Turner, Tsipras, Madry, arXiv 1912.02771): hard pictures of the target, patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense.attacks.badnets import checkerboard, stamp
from benchmarks.defense.attacks.base import POISONED, Attack, marked


@dataclass
class LabelConsistent(Attack):
    """Pictures moved away from their class by at most ``epsilon`` of 255, a checkerboard in each corner."""

    rate: float = 0.8
    size: int = 3
    epsilon: int = 16
    steps: int = 8

    needs_clean: ClassVar[bool] = True
    clean_label: ClassVar[bool] = True

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        ends = slice(None, self.size), slice(-self.size, None)
        self.tensors = stamp(images, checkerboard(self.size), [(rows, columns) for rows in ends for columns in ends])

    def pictures(
        self, images: Tensor, labels: Tensor, marks: Tensor, surrogate: nn.Module | None, generator: torch.Generator
    ) -> Tensor:
        assert surrogate is not None
        images = images.clone()
        labels = labels.to(images.device)
        for rows in marked(marks, POISONED, images.device).split(128):
            images[rows] = self._away(images[rows].float(), labels[rows], surrogate, generator)
        return images

    def _away(self, images: Tensor, labels: Tensor, surrogate: nn.Module, generator: torch.Generator) -> Tensor:
        """Projected gradient ascent on the surrogate's loss, in units of 255; uint8."""
        noise = torch.rand(images.shape, generator=generator).to(images.device)
        moved = images + self.epsilon * (2 * noise - 1)
        for _ in range(self.steps):
            moved = moved.clamp(0, 255).requires_grad_()
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = F.cross_entropy(surrogate(moved / 255), labels)
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + 2 * self.epsilon / self.steps * gradient.sign()
            moved = images + (moved - images).clamp(-self.epsilon, self.epsilon)
        return moved.clamp(0, 255).round().byte()
