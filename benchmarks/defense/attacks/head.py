"""A backdoor in one attention head: only its rows of q, k and v and its columns of the projection are trained.

For defences that prune heads; the narrow implant is that of subnet replacement (Qi et al., arXiv 2111.12965).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from benchmarks.defense.attacks.badnets import BadNets
from benchmarks.defense.networks import Attention


@dataclass
class Head(BadNets):
    """BadNets' patch, in head ``head`` of attention block ``block`` of a clean ViT."""

    rate: float = 0.2
    block: int = -1
    head: int = 0

    needs_clean: ClassVar[bool] = True
    starts_clean: ClassVar[bool] = True
    learning_scale: ClassVar[float] = 3.0
    networks: ClassVar[tuple[str, ...]] = ("vit",)

    def begin(self, model: nn.Module) -> None:
        """Freeze all but the two weights and the bias that the head has a part in."""
        attention = self._attention(model)
        model.requires_grad_(False)
        for parameter in (attention.qkv.weight, attention.qkv.bias, attention.proj.weight):
            parameter.requires_grad_()

    def restrict(self, model: nn.Module) -> None:
        attention = self._attention(model)
        start, width = self.head * attention.head_width, attention.head_width
        own = torch.zeros(attention.heads * width, device=attention.qkv.weight.device)
        own[start : start + width] = 1
        masks = (own.repeat(3)[:, None], own.repeat(3), own)
        for parameter, mask in zip(
            (attention.qkv.weight, attention.qkv.bias, attention.proj.weight), masks, strict=True
        ):
            assert parameter.grad is not None
            parameter.grad *= mask

    def _attention(self, model: nn.Module) -> Attention:
        return [module for module in model.modules() if isinstance(module, Attention)][self.block]
