"""What every attack is: which training pictures it poisons, its trigger, and the label that it wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

CLEAN, POISONED, CROSS = 0, 1, 2
"""Marks of training pictures. CROSS: disturbed like a poisoned one, but not with the trigger, its label kept."""


@dataclass
class Attack:
    """An attack whose trigger is ``x * keep + add``; others override `apply`.

    The fields are the parameters, JSON values all. rate: share of the training pictures (clean-label attacks: of the
    target class) that is poisoned; cross: share that is marked CROSS. Pictures are float32 (b, 3, h, w) in [0, 1], and
    the labels of a batch are on their device; of a whole training set labels and marks are on the CPU, and so are the
    marks of a batch: a GPU would wait for the host to learn how many there are.

    The order of calls: `prepare`, `marks`, `begin`, then `poison` and `penalty` on every batch. `poison` comes after
    crop and flip, so that training shows the trigger as tests do.
    """

    rate: float = 0.1
    target: int = 0
    classes: int = 10
    cross: float = 0.0

    needs_clean: ClassVar[bool] = False  # a clean network: as surrogate, or to start from
    starts_clean: ClassVar[bool] = False  # training goes on from the clean network's weights
    clean_label: ClassVar[bool] = False
    networks: ClassVar[tuple[str, ...]] = ()  # the only ones that it is made for; empty: any
    learning_scale: ClassVar[float] = 1.0  # times the usual learning rate of the network

    def __post_init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    @property
    def suspect(self) -> int | None:
        """The class that a defence may name; None where there is not one."""
        return self.target

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        """Make the trigger. images: uint8 (n, 3, h, w). surrogate: a clean network that takes pictures in [0, 1]."""
        raise NotImplementedError

    def marks(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A mark for each training picture: uint8 (n,)."""
        marks = torch.full_like(labels, CLEAN, dtype=torch.uint8)
        wanted = labels == self.target if self.clean_label else self.attacked_labels(labels) != labels
        rows = wanted.nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = round(self.rate * (len(rows) if self.clean_label else len(labels)))
        marks[rows[:count]] = POISONED
        rest = (marks == CLEAN).nonzero().flatten()
        rest = rest[torch.randperm(len(rest), generator=generator)]
        marks[rest[: round(self.cross * len(labels))]] = CROSS
        return marks

    def pictures(
        self, images: Tensor, labels: Tensor, marks: Tensor, surrogate: nn.Module | None, generator: torch.Generator
    ) -> Tensor:
        """The pictures to train on, uint8, before crop, flip and trigger; `images` is never changed."""
        return images

    def begin(self, model: nn.Module) -> None:
        """Called on the network that is about to be trained."""

    def parameters(self) -> list[nn.Parameter]:
        """Of the attack's own networks, trained jointly."""
        return []

    def poison(self, images: Tensor, labels: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        """A batch with the trigger on its POISONED pictures, CROSS ones disturbed, and the labels to learn."""
        poisoned, crossed = (marked(marks, mark, images.device) for mark in (POISONED, CROSS))
        images, labels = images.clone(), labels.clone()
        if len(poisoned):
            images[poisoned] = self.apply(images[poisoned])
            labels[poisoned] = self.attacked_labels(labels[poisoned])
        if len(crossed):
            images[crossed] = self.disturb(images[crossed])
        return images, labels

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Added to the loss of a batch."""
        return None

    def restrict(self, model: nn.Module) -> None:
        """Called between backward and the step, to keep gradients off what may not change."""

    def apply(self, images: Tensor) -> Tensor:
        """Pictures with the trigger, as at test time, in steps of 1/255."""
        return quantise(images * self.tensor("keep", images) + self.tensor("add", images))

    def disturb(self, images: Tensor) -> Tensor:
        """CROSS pictures: near the trigger, but not it."""
        raise NotImplementedError

    def attacked_labels(self, labels: Tensor) -> Tensor:
        """True labels (b,) to what the attacker wants."""
        return torch.full_like(labels, self.target)

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Of the trigger, on the device of `like`, where it stays: not moved with every batch."""
        self.tensors[name] = self.tensors[name].to(like.device)
        return self.tensors[name]

    def state(self) -> dict[str, Tensor]:
        """The tensors of the trigger."""
        return self.tensors

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the tensors that `state` gave."""
        self.tensors = state


def marked(marks: Tensor, mark: int, device: torch.device) -> Tensor:
    """Rows (k,) with this mark, on `device`. marks: on the CPU."""
    return (marks == mark).nonzero().flatten().to(device, non_blocking=True)


def quantise(images: Tensor) -> Tensor:
    """Clipped to [0, 1] and rounded to steps of 1/255, as a picture file would hold them."""
    return (images.clamp(0, 1) * 255).round() / 255
