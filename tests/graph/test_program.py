"""A program takes any number of pictures, on any number of threads, and reads the mask in every call."""

from __future__ import annotations

import pytest
import torch
from levels import close, found, outputs
from torch import nn

from mnp_fast.graph.capture import capture
from mnp_fast.masked import Execution, masked
from mnp_fast.sites import find_sites, total_neurons


@pytest.mark.parametrize("pictures", [1, 2, 3, 4, 7])
def test_any_number_of_pictures(pictures: int) -> None:
    model, images, sites, captured = found("narrow resnet18")
    images = torch.randn(pictures, *images.shape[1:], generator=torch.Generator().manual_seed(1))
    expected = outputs(model, sites, images, Execution())
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # pictures are shared out over the cores
        try:
            given = outputs(model, sites, images, Execution(captured))
        finally:
            torch.set_num_threads(before)
        assert close(given[0], expected[0], 1e-5)
        assert close(given[1], expected[1], 1e-4)


class Centred(nn.Module):
    """Takes the mean of the batch out, in evaluation mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


def test_pictures_that_meet_are_not_shared_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Centred(), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.randn(6, 3, 8, 8)
    sites = find_sites(model, images)
    captured = capture(model, sites, images)
    assert captured.reason is None
    assert not captured.apart
    assert found("narrow resnet18")[3].apart
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        given = outputs(model, sites, images, Execution(captured))
    finally:
        torch.set_num_threads(before)
    expected = outputs(model, sites, images, Execution())
    assert close(given[0], expected[0], 1e-5)
    assert close(given[1], expected[1], 1e-4)


def test_the_mask_may_change_between_forwards() -> None:
    model, images, sites, captured = found("narrow resnet18")
    mask = torch.ones(total_neurons(sites))
    with torch.no_grad(), masked(model, sites, mask, how=Execution(captured)):
        first = model(images)
        mask[:16] = 0
        changed = model(images)
    assert not torch.equal(first, changed)
    with torch.no_grad(), masked(model, sites, mask):
        assert close(changed, model(images), 1e-5)


@pytest.mark.parametrize("of_mask", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_pictures_take_gradients_too(threads: int, of_mask: bool) -> None:
    model, images, sites, captured = found("narrow resnet18")
    images = torch.randn(5, *images.shape[1:], generator=torch.Generator().manual_seed(1))
    wanted = torch.randn(5, model(images).shape[1], generator=torch.Generator().manual_seed(2))

    def gradients(how: Execution) -> tuple[torch.Tensor, ...]:
        mask = torch.full((total_neurons(sites),), 0.7, requires_grad=of_mask)
        given = images.clone().requires_grad_()
        with masked(model, sites, mask, how=how):
            loss = (model(given) * wanted).sum()
            return torch.autograd.grad(loss, [given, mask] if of_mask else [given])

    expected = gradients(Execution())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = gradients(Execution(captured))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(got, expected, strict=True):
        assert close(one, other, 1e-4)
