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
        inside = slice(-1 - self.size, -1)
        self.tensors = stamp(images, checkerboard(self.size), [(inside, inside)])


@dataclass
class AllToAll(BadNets):
    """The paper's all-to-all attack: class i becomes i + 1. ASR is at most what the clean function leaves of it."""

    rate: float = 0.2

    @property
    def suspect(self) -> int | None:
        return None

    def attacked_labels(self, labels: Tensor) -> Tensor:
        return (labels + 1) % self.classes


def checkerboard(size: int) -> Tensor:
    """(size, size) of 0 and 1, the upper left corner 1."""
    steps = torch.arange(size)
    return ((steps[:, None] + steps + 1) % 2).float()


def stamp(images: Tensor, patch: Tensor, places: list[tuple[slice, slice]]) -> dict[str, Tensor]:
    """``keep`` and ``add`` that put `patch`, (s, s) or (3, s, s), at `places` of pictures like `images`."""
    size = images.shape[-2:]
    keep, add = torch.ones(1, *size, device=patch.device), torch.zeros(3, *size, device=patch.device)
    for rows, columns in places:
        keep[:, rows, columns] = 0
        add[:, rows, columns] = patch
    return {"keep": keep, "add": add}
