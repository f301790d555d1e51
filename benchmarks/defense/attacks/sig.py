"""SIG (Barni, Kallas, Tondi, arXiv 1902.11237): a sinusoid on pictures of the target class, whose labels are right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.defense.attacks.base import Attack


@dataclass
class Sig(Attack):
    """``amplitude`` of 255, ``frequency`` periods over the width."""

    rate: float = 0.8
    amplitude: float = 40.0
    frequency: int = 6

    clean_label: ClassVar[bool] = True

    def prepare(self, images: Tensor, labels: Tensor, surrogate: nn.Module | None, generator: torch.Generator) -> None:
        columns = torch.arange(images.shape[-1]) / images.shape[-1]
        wave = self.amplitude / 255 * torch.sin(2 * math.pi * self.frequency * columns)
        self.tensors = {"keep": torch.ones(()), "add": wave.expand(images.shape[1:]).clone()}
