"""A network at both levels, module and graph, for the tests that compare the two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from networks import ARCHITECTURES, SMALL, logits, make
from torch import Tensor, nn

from mnp_fast.graph.capture import capture
from mnp_fast.graph.trace import Captured
from mnp_fast.masked import Execution, masked
from mnp_fast.sites import Site, find_sites, total_neurons


def found(name: str) -> tuple[nn.Module, Tensor, tuple[Site, ...], Captured]:
    model, images = make((ARCHITECTURES | SMALL)[name])
    sites = find_sites(model, images)
    return model, images, sites, capture(model, sites, images)


def partial_mask(sites: tuple[Site, ...], seed: int = 0) -> Tensor:
    """Half of the masks at one, the others anywhere down to zero."""
    mask = 2 * torch.rand(total_neurons(sites), generator=torch.Generator().manual_seed(seed))
    return mask.clamp(max=1).requires_grad_()


def outputs(
    model: nn.Module, sites: tuple[Site, ...], images: Tensor, how: Execution, batch_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """(logits, gradient of the mask) of a loss that every logit counts in."""
    mask = partial_mask(sites)
    with masked(model, sites, mask, batch_statistics=batch_statistics, how=how):
        out = logits(model(images)).float()
        weights = torch.linspace(-1, 1, out.shape[1])
        (gradient,) = torch.autograd.grad((F.log_softmax(out, 1) * weights).sum(), mask)
    return out.detach(), gradient


def close_in_every_site(a: Tensor, b: Tensor, sites: tuple[Site, ...], tolerance: float) -> bool:
    """Of gradients of the mask: a site whose own is small counts as much as the others."""
    sizes = [site.neurons for site in sites]
    return all(close(one, other, tolerance) for one, other in zip(a.split(sizes), b.split(sizes), strict=True))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())
