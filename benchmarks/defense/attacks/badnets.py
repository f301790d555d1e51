"""BadNets (Gu, Dolan-Gavitt, Garg, arXiv 1708.06733): a small patch, to one target or to the next class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.defense.attacks.base import Attack


@dataclass
class BadNets(Attack):
    """A black and white checkerboard of ``size`` pixels, one pixel off the lower right corner."""

    rate: float = 0.05
    size: int = 3

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        height, width = images.shape[-2:]
        patch = checkerboard(self.size)
        self.tensors = {"keep": torch.ones(1, height, width), "add": torch.zeros(3, height, width)}
        rows, cols = slice(-1 - self.size, -1), slice(-1 - self.size, -1)
        self.tensors["keep"][:, rows, cols] = 0
        self.tensors["add"][:, rows, cols] = patch


@dataclass
class AllToAll(BadNets):
    """Section 4 of the paper: class i becomes i + 1. ASR is at most what the clean function leaves of it."""

    rate: float = 0.2

    @property
    def suspect(self) -> int | None:
        return None

    def attacked_labels(self, labels: Tensor) -> Tensor:
        return (labels + 1) % self.classes


def checkerboard(size: int) -> Tensor:
    """(size, size) of 0 and 1, the corners 1."""
    steps = torch.arange(size)
    return ((steps[:, None] + steps + 1) % 2).float()
