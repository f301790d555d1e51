"""Small networks for pictures of 32x32 and the like: four with BatchNorm, one vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build(name: str, classes: int) -> nn.Module:
    """A network with fresh weights: pictures (b, 3, h, w) to logits (b, classes). SystemExit for an unknown name."""
    if name not in NETWORKS:
        raise SystemExit(f"there is no network {name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[name](classes)


class ResNet(nn.Module):
    """ResNet of basic blocks for small pictures: a 3x3 stem, stages that double the width, projected shortcuts."""

    def __init__(self, classes: int, *, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = _conv(3, width)
        self.norm = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        before = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(BasicBlock(before, width << stage, 2 if stage and not block else 1))
                before = width << stage
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class VGG(nn.Module):
    """Six convolutions with BatchNorm, 448 channels, halved in size after every second."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(pairwise((3, 32, 32, 64, 64, 128, 128))):
            layers += [_conv(before, width), nn.BatchNorm2d(width), nn.ReLU()]
            if number % 2:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class ViT(nn.Module):
    """Vision transformer with LayerNorm first and mean pooling. Pictures of `size` pixels, in patches of `patch`."""

    def __init__(
        self, classes: int, *, size: int = 32, patch: int = 4, width: int = 96, depth: int = 4, heads: int = 3
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class TransformerBlock(nn.Module):
    """Attention and an MLP of twice the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention; rows of ``qkv`` are q of all heads, then k, then v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


def _conv(before: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, stride, 1, bias=False)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "narrow18": lambda classes: ResNet(classes, width=16, blocks=(2, 2, 2, 2)),
    "resnet18": lambda classes: ResNet(classes, width=64, blocks=(2, 2, 2, 2)),
    "resnet20": lambda classes: ResNet(classes, width=16, blocks=(3, 3, 3)),
    "vgg": VGG,
    "vit": ViT,
}
