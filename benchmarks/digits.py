"""A small classifier with a BadNets backdoor, on the 1,797 handwritten digits that scikit-learn carries."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TARGET = 0
DEFENCE = 300
TEST = 500


class SmallNet(nn.Module):
    """Four convolutions with BatchNorm, widths 32 and 64, and a linear layer. Input (b, 1, 16, 16), logits (b, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 32, 64, 64)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i == 1:
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Digits:
    """images: (n, 1, 16, 16) float32 in [0, 1]; labels: (n,) int64. Three parts that share no picture."""

    train: tuple[Tensor, Tensor]
    defence: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The defence set as a user would pass it."""
        return DataLoader(TensorDataset(*self.defence), batch_size=100)

    def triggered(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test pictures of the other classes with the trigger, labelled with the attacker's target."""
        images, labels = self.test
        images = add_trigger(images[labels != TARGET])
        return DataLoader(TensorDataset(images, torch.full((len(images),), TARGET)), batch_size=250)


def load(seed: int = 0) -> Digits:
    """The digits, doubled to 16x16, shuffled with ``seed`` and split: attacker's training set, defence set, test."""
    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([len(labels) - DEFENCE - TEST, DEFENCE, TEST])
    train, defence, test = ((images[part], labels[part]) for part in parts)
    return Digits(train, defence, test)


def add_trigger(images: Tensor) -> Tensor:
    """BadNets (arXiv 1708.06733): a 3x3 checkerboard in the lower right corner, on a copy."""
    images = images.clone()
    images[..., -3:, -3:] = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    return images


def train(data: Digits, *, backdoored: bool, seed: int = 0, epochs: int = 20, rate: float = 0.1) -> SmallNet:
    """A network trained from scratch; backdoored: a tenth of its pictures carry the trigger and the target label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images, labels = data.train[0].clone(), data.train[1].clone()
        if backdoored:
            poisoned = torch.randperm(len(labels))[: int(rate * len(labels))]
            images[poisoned] = add_trigger(images[poisoned])
            labels[poisoned] = TARGET
        model = SmallNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels)).split(64):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pictures put into the class of their label."""
    return float((model(images).argmax(1) == labels).float().mean())


def attack_success(model: nn.Module, data: Digits) -> float:
    """ASR: share of triggered test pictures of the other classes that the model puts into the target class."""
    images, labels = data.test
    others = add_trigger(images[labels != TARGET])
    return accuracy(model, others, torch.full((len(others),), TARGET))
