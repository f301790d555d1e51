"""The graph level against the module level: the same numbers, on every architecture that the modules are tested on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import ARCHITECTURES, SMALL, logits, make, snapshot
from torch import Tensor, nn

from mnp_fast.graph import Captured, capture
from mnp_fast.masked import Execution, masked
from mnp_fast.sites import Site, find_sites, total_neurons

# Why these are not captured; every other one must be.
NOT_CAPTURED: dict[str, str] = {}


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


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SMALL])
def test_architecture(name: str) -> None:
    model, images, sites, captured = found(name)
    if name in NOT_CAPTURED:
        assert captured.reason is not None
        assert NOT_CAPTURED[name] in captured.reason
        return
    assert captured.reason is None
    assert captured.batch is None
    before = snapshot(model)
    expected = outputs(model, sites, images, Execution())
    given = outputs(model, sites, images, Execution(captured))
    assert close(given[0], expected[0], 1e-4)
    assert close(given[1], expected[1], 1e-3)
    more = torch.cat([images, images.flip(-1), images[:1]])
    assert captured.takes(more)
    assert close(outputs(model, sites, more, Execution(captured))[0], outputs(model, sites, more, Execution())[0], 1e-4)
    assert snapshot(model) == before
