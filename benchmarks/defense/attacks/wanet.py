"""WaNet (Nguyen, Tran, arXiv 2102.10369): a smooth warp of the picture, with the noise mode against other warps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense.attacks.base import Attack, quantise


@dataclass
class WaNet(Attack):
    """``knots`` x ``knots`` random shifts of ``strength`` / 2 pixels on average, smoothed; CROSS adds jitter."""

    cross: float = 0.1
    knots: int = 4
    strength: float = 0.75

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        height, width = images.shape[-2:]
        field = 2 * torch.rand(1, 2, self.knots, self.knots, generator=generator) - 1
        field = F.interpolate(field / field.abs().mean(), (height, width), mode="bicubic", align_corners=True)
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        grid = torch.stack([columns, rows], -1) + self.strength / height * field[0].permute(1, 2, 0)
        self.tensors = {"grid": grid.clamp(-1, 1)}

    def apply(self, images: Tensor) -> Tensor:
        return _warp(images, self.tensor("grid", images).expand(len(images), -1, -1, -1))

    def disturb(self, images: Tensor) -> Tensor:
        grid = self.tensor("grid", images)
        jitter = 2 * torch.rand(len(images), *grid.shape, device=images.device) - 1
        return _warp(images, (grid + jitter / len(grid)).clamp(-1, 1))


def _warp(images: Tensor, grid: Tensor) -> Tensor:
    return quantise(F.grid_sample(images, grid, align_corners=True))
