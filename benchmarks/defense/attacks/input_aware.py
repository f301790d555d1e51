"""Input-aware dynamic attack (Nguyen, Tran, arXiv 2010.08138): a generator gives every picture a trigger of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense.attacks.base import CROSS, POISONED, Attack, marked, quantise

_BATCH, _RATE = 64, 1e-2  # of the places, which are learned before the network
_STEEP = 10.0  # of their sigmoid: a pixel is covered or it is not


class Generator(nn.Module):
    """Pictures (b, 3, h, w) in [0, 1] to planes (b, outputs, h, w) in (0, 1).

    Norms are of groups: with those of a batch a picture's trigger would go by its neighbours.
    """

    def __init__(self, width: int, outputs: int, steep: float = 1.0) -> None:
        super().__init__()
        self.steep = steep
        self.down0, self.down1, self.down2 = _block(3, width), _block(width, 2 * width), _block(2 * width, 4 * width)
        self.up1, self.up0 = _block(4 * width, 2 * width), _block(2 * width, width)
        self.last = nn.Conv2d(width, outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down0(2 * x - 1)
        middle = self.down1(F.max_pool2d(fine, 2, ceil_mode=True))
        coarse = self.down2(F.max_pool2d(middle, 2, ceil_mode=True))
        middle = self.up1(F.interpolate(coarse, size=middle.shape[-2:]))
        return (self.steep * self.last(self.up0(F.interpolate(middle, size=fine.shape[-2:])))).sigmoid()


@dataclass
class InputAware(Attack):
    """Patterns are learned with the network. CROSS pictures get another picture's trigger and keep their label.

    As in the paper, where a trigger covers its picture is learned first and then kept. width: of both generators, a
    multiple of 4. density: share of the pixels that a trigger may cover (the paper: .032, and 600 passes). diversity:
    weight of the loss that keeps patterns apart. steps: in which places are learned.
    """

    cross: float = 0.1
    width: int = 16
    density: float = 0.1
    diversity: float = 1.0
    steps: int = 300

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        self._build(images.device)
        optimizer = torch.optim.Adam(self.places.parameters(), _RATE)
        for _ in range(self.steps):
            rows = torch.randint(len(images), (_BATCH,), generator=generator)
            batch = images[rows.to(images.device)].float() / 255
            place = self.places(batch)
            loss = _alike(batch, place) + 100 * (place.mean((1, 2, 3)) - self.density).relu().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.places.requires_grad_(False)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.patterns.parameters())

    def poison(self, images: Tensor, labels: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        poisoned, crossed = (marked(marks, mark, images.device) for mark in (POISONED, CROSS))
        rows = torch.cat([poisoned, crossed])
        # Of each poisoned or crossed picture, the trigger is made from a picture: its own, or another one.
        donors = torch.cat([images[poisoned], images.roll(1, 0)[crossed]])
        pattern, place = self.patterns(donors), self.places(donors)
        self.loss = self.diversity * _alike(donors, pattern) if len(rows) else None
        triggered = images.index_copy(0, rows, images[rows] * (1 - place) + pattern * place)
        return triggered, labels.index_copy(0, poisoned, self.attacked_labels(labels[poisoned]))

    def penalty(self, model: nn.Module) -> Tensor | None:
        return self.loss

    @torch.no_grad()
    def apply(self, images: Tensor) -> Tensor:
        pattern, place = (made.to(images.device)(images) for made in (self.patterns, self.places))
        return quantise(images * (1 - place) + pattern * place)

    def state(self) -> dict[str, Tensor]:
        return self._both().state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._build(torch.device("cpu"))
        try:
            self._both().load_state_dict(state)
        except RuntimeError as error:
            raise SystemExit(
                f"this Input-aware trigger is of an older version: train the network anew ({error})"
            ) from None

    def _build(self, device: torch.device) -> None:
        self.patterns = Generator(self.width, 3).to(device)
        self.places = Generator(self.width, 1, _STEEP).to(device)

    def _both(self) -> nn.ModuleDict:
        return nn.ModuleDict({"patterns": self.patterns, "places": self.places})


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.ReLU())


def _alike(images: Tensor, made: Tensor) -> Tensor:
    """How much more alike what is made of two pictures is than they are: the mean ratio of distances."""
    apart, found = (x.sub(x.roll(1, 0)).square().mean((1, 2, 3)).add(1e-6).sqrt() for x in (images, made))
    return (apart / (found + 0.01)).mean()
