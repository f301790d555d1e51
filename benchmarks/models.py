"""Networks to measure on: random weights from a fixed seed, with statistics that make every mask matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnp_fast.architectures import build, preprocessing
from mnp_fast.sites import Site, find_sites, total_neurons
from mnp_fast.stats import magnitude

ALIASES = {"resnet18": ("torchvision/resnet18", 32, 10), "resnet50": ("torchvision/resnet50", 224, None)}
"""Short names: (architecture, size of pictures, classes). resnet18 is torchvision's, its stem of stride 2 as it is."""


@dataclass(frozen=True)
class Workload:
    """What one step works on.

    model: float32, eval mode, never changed. images: (b, 3, s, s) float32; labels: (b,) int64. mask: (neurons,)
    float32, not all ones; magnitude: (neurons,) float32. All on one device.
    """

    arch: str
    model: nn.Module
    sites: Sequence[Site]
    images: Tensor
    labels: Tensor
    mask: Tensor
    magnitude: Tensor


def network(arch: str, size: int | None = None, classes: int | None = None, seed: int = 0) -> tuple[nn.Module, int]:
    """(the randomized network in eval mode, size of its pictures)."""
    spec, own_size, own_classes = ALIASES.get(arch, (arch, None, None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomize_(build(spec, classes or own_classes)).eval()
    return model, size or own_size or preprocessing(spec, model).size or 32


def workload(arch: str, batch: int, device: torch.device, size: int | None = None, seed: int = 0) -> Workload:
    """A network, random pictures and labels, and masks between a half and one."""
    model, size = network(arch, size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return of_model(arch, model.to(device), images.to(device), seed)


def of_model(arch: str, model: nn.Module, images: Tensor, seed: int = 0) -> Workload:
    """The workload of a network that is there already, on the device of ``images``."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model, images)
    with torch.no_grad():
        classes = model(images[:2]).shape[1]
    labels = torch.randint(classes, (len(images),), generator=generator)
    mask = 0.5 + 0.5 * torch.rand(total_neurons(sites), generator=generator)
    device = images.device
    return Workload(arch, model, sites, images, labels.to(device), mask.to(device), magnitude(model, sites))


def randomize_(model: nn.Module) -> nn.Module:
    """Statistics and gains a little off what a fresh network has, and no layer that is zero; draws from torch."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.25)
                if module.affine:
                    module.weight.uniform_(0.8, 1.2)
                    module.bias.normal_(0, 0.1)
        for parameter in model.parameters():
            if float(parameter.abs().max()) < 1e-3:
                parameter.normal_(0, 0.1)
    return model
