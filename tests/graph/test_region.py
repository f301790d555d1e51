"""A region of convolutions against the same convolutions one by one under autograd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnp_fast.frozen import FrozenConv2d
from mnp_fast.graph.layers import Affine
from mnp_fast.graph.region import Link, Region
from mnp_fast.ops import force_backend, samples

CHANNELS = 16
# (x, residual, kernel, stride, activation); values: the input is 0, link i gives i + 1.
BOTTLENECKS = [
    (0, None, 3, 1, "relu"),
    (1, None, 1, 1, "relu"),
    (2, None, 3, 1, "relu"),
    (3, 1, 1, 1, "relu"),  # the residual is what the branch began with
    (4, None, 1, 2, "relu"),
    (4, None, 1, 2, "none"),  # a shortcut of its own
    (5, 6, 3, 1, "relu"),
]
LINEAR_ENDS = [(0, None, 1, 1, "relu"), (1, None, 3, 1, "relu"), (2, 1, 1, 1, "none"), (3, 3, 3, 1, "none")]


def build(plan: Sequence[tuple], outputs: Sequence[int], masks: list[Tensor]) -> Region:  # type: ignore[type-arg]
    torch.manual_seed(0)
    links = []
    for i, (x, residual, kernel, stride, act) in enumerate(plan):
        weight = torch.randn(CHANNELS, CHANNELS, kernel, kernel) / (CHANNELS * kernel * kernel) ** 0.5
        conv = FrozenConv2d(weight, None, (stride, stride), (kernel // 2,) * 2, (1, 1), 1)
        vectors = [torch.rand(CHANNELS) + 0.5, *(0.2 * torch.randn(CHANNELS) for _ in range(2))]
        links.append(Link(conv, Affine(lambda i=i: masks[i], *vectors, act), x, residual))
    return Region(links, 1, outputs)


def one_by_one(region: Region, masks: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    values = [x]
    for link, mask in zip(region.links, masks, strict=True):
        scale, center, shift = (v.to(x.dtype).view(-1, 1, 1) for v in link.affine.vectors)
        z = F.conv2d(values[link.x], link.conv.plain.to(x.dtype), None, link.conv.stride, link.conv.padding)
        y = mask.to(x.dtype).view(-1, 1, 1) * scale * (z - center) + shift
        y = y if link.residual is None else y + values[link.residual]
        values.append(y.relu() if link.affine.act == "relu" else y)
    return [values[i] for i in region.outputs]


def make_masks(count: int) -> list[Tensor]:
    masks = [torch.rand(CHANNELS, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    for mask in masks:
        mask[::5] = 0.0
    return [mask.requires_grad_() for mask in masks]


def loss(outputs: Sequence[Tensor]) -> Tensor:
    return sum((y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize(
    ("plan", "outputs"), [(BOTTLENECKS, [7]), (BOTTLENECKS, [3, 7]), (BOTTLENECKS, [4, 6, 7]), (LINEAR_ENDS, [4])]
)
def test_values_and_gradients(plan: list, outputs: list, of_x: bool, backend: str) -> None:  # type: ignore[type-arg]
    masks = make_masks(len(plan))
    with force_backend(backend):
        region = build(plan, outputs, masks)
        x = torch.randn(3, CHANNELS, 9, 10, requires_grad=of_x)
        found = region(x)
        found = [found] if isinstance(found, Tensor) else list(found)
        wanted = [*masks, x] if of_x else masks
        given = torch.autograd.grad(loss(found), wanted)
    doubles = [mask.detach().double().requires_grad_() for mask in masks]
    exact_x = x.detach().double().requires_grad_(of_x)
    exact = one_by_one(region, doubles, exact_x)
    expected = torch.autograd.grad(loss(exact), [*doubles, exact_x] if of_x else doubles)
    for a, b in zip((*found, *given), (*exact, *expected), strict=True):
        assert float((a - b).detach().norm()) <= 1e-5 * float(b.detach().norm())
    with torch.no_grad():
        again = region(x)
    for a, b in zip(found, [again] if isinstance(again, Tensor) else again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_gradient_from_outside_is_left_as_it_is() -> None:
    masks = make_masks(len(BOTTLENECKS))
    region = build(BOTTLENECKS, [7], masks)
    y = region(torch.randn(2, CHANNELS, 8, 8))
    grad = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    before = grad.clone()
    torch.autograd.grad(y, masks, grad)
    assert torch.equal(grad, before)


def test_a_kept_graph_can_be_walked_again_and_one_let_go_cannot() -> None:
    masks = make_masks(len(BOTTLENECKS))
    y = build(BOTTLENECKS, [7], masks)(torch.randn(2, CHANNELS, 8, 8))
    first = torch.autograd.grad(loss([y]), masks, retain_graph=True)
    second = torch.autograd.grad(loss([y]), masks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss([y]), masks)


def test_masks_that_are_watched_tell_of_every_picture() -> None:
    masks = make_masks(len(BOTTLENECKS))
    rows: dict[int, Tensor] = {}
    for i, mask in enumerate(masks):
        samples.watch(mask, lambda shape, found, i=i: rows.__setitem__(i, found))
    y = build(BOTTLENECKS, [7], masks)(torch.randn(3, CHANNELS, 8, 8))
    total = torch.autograd.grad(loss([y]), masks)
    for i, expected in enumerate(total):
        assert rows[i].shape == (3, CHANNELS)
        torch.testing.assert_close(rows[i].sum(0), expected, rtol=1e-4, atol=1e-4)


def test_what_needs_no_gradient_gets_none() -> None:
    x, masks = torch.randn(2, CHANNELS, 8, 8), make_masks(len(BOTTLENECKS))
    expected = torch.autograd.grad(loss([build(BOTTLENECKS, [7], masks)(x)]), masks)
    alone = [mask.detach() for mask in masks]
    assert not build(BOTTLENECKS, [7], alone)(x).requires_grad
    for i in (0, 3, 5, 6):
        own = [mask.detach().requires_grad_(number == i) for number, mask in enumerate(masks)]
        (gradient,) = torch.autograd.grad(loss([build(BOTTLENECKS, [7], own)(x)]), own[i])
        torch.testing.assert_close(gradient, expected[i])
