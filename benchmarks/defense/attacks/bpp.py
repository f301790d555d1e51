"""BppAttack (Wang, Zhai, Ma, arXiv 2205.13383): fewer colours, dithered; the trigger is the error of quantisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense.attacks.base import Attack, quantise

# Floyd and Steinberg: what the pixels at (row, column) from here take of the error.
SHARES = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))


@dataclass
class Bpp(Attack):
    """``levels`` a channel. CROSS pictures get the quantisation error of another picture."""

    cross: float = 0.1
    levels: int = 8

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        self.tensors = {}

    def apply(self, images: Tensor) -> Tensor:
        return quantise(dither(images, self.levels))

    def disturb(self, images: Tensor) -> Tensor:
        others = images.roll(1, 0)
        return quantise(images + self.apply(others) - others)


def dither(images: Tensor, levels: int) -> Tensor:
    """Floyd-Steinberg dithering of pictures (b, c, h, w) in [0, 1] to `levels` values a channel."""
    height, width = images.shape[-2:]
    # A border takes what falls off the picture.
    work = F.pad(images, (1, 1, 0, 1))
    done = torch.empty_like(images)
    # Pixels with the same column + 2 * row do not wait for one another.
    for step in range(width + 2 * (height - 1)):
        first, last = max(0, (step - width + 2) // 2), min(height - 1, step // 2)
        rows = torch.arange(first, last + 1, device=images.device)
        columns = step - 2 * rows
        value = work[..., rows, columns + 1]
        rounded = (value * (levels - 1)).round().clamp(0, levels - 1) / (levels - 1)
        done[..., rows, columns] = rounded
        for down, right, share in SHARES:
            work[..., rows + down, columns + 1 + right] += share * (value - rounded)
    return done
