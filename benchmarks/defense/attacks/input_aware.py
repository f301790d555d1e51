"""Input-aware dynamic attack (Nguyen, Tran, arXiv 2010.08138): a generator gives every picture a trigger of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense.attacks.base import CROSS, POISONED, Attack, marked, quantise


class Generator(nn.Module):
    """Pictures (b, 3, h, w) in [0, 1] to a pattern (b, 3, h, w) and where it shows (b, 1, h, w), both in (0, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.up1, self.up2 = nn.Conv2d(2 * width, width, 3, 1, 1), nn.Conv2d(width, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.down2(F.relu(self.down1(2 * x - 1))))
        y = F.relu(self.up1(F.interpolate(y, size=((x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2))))
        y = self.up2(F.interpolate(y, size=x.shape[-2:])).sigmoid()
        return y[:, :3], y[:, 3:]


@dataclass
class InputAware(Attack):
    """The generator is trained with the network. CROSS pictures get another picture's trigger and keep their label.

    width: of the generator. density: share of the pixels that the trigger may cover; the paper trains the part that
    says where beforehand, here both parts learn together. diversity: weight of the loss that keeps patterns apart.
    """

    cross: float = 0.1
    width: int = 16
    density: float = 0.1
    diversity: float = 1.0

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        self.generator = Generator(self.width).to(images.device)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.generator.parameters())

    def poison(self, images: Tensor, labels: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        poisoned, crossed = (marked(marks, mark, images.device) for mark in (POISONED, CROSS))
        # Of each poisoned or crossed picture, the trigger is made from a picture: its own, or another one.
        donors = torch.cat([images[poisoned], images.roll(1, 0)[crossed]])
        pattern, place = self.generator(donors)
        rows = torch.cat([poisoned, crossed])
        triggered = images.index_copy(0, rows, images[rows] * (1 - place) + pattern * place)
        labels = labels.index_copy(0, poisoned, self.attacked_labels(labels[poisoned]))
        self.loss = self._loss(donors, pattern, place) if len(rows) else None
        return triggered, labels

    def penalty(self, model: nn.Module) -> Tensor | None:
        return self.loss

    @torch.no_grad()
    def apply(self, images: Tensor) -> Tensor:
        pattern, place = self.generator.to(images.device)(images)
        return quantise(images * (1 - place) + pattern * place)

    def state(self) -> dict[str, Tensor]:
        return self.generator.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.generator = Generator(self.width)
        self.generator.load_state_dict(state)

    def _loss(self, donors: Tensor, pattern: Tensor, place: Tensor) -> Tensor:
        """Patterns as far apart as their pictures are, and few pixels covered."""
        apart, patterns = (x.sub(x.roll(1, 0)).square().mean((1, 2, 3)).add(1e-6).sqrt() for x in (donors, pattern))
        same = (apart / (patterns + 0.01)).mean()
        return self.diversity * same + 20 * (place.mean((1, 2, 3)) - self.density).relu().mean()
