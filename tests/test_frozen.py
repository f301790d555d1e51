"""Frozen products against torch's own, values and gradients of the input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnp_fast.frozen import FrozenConv2d, FrozenLinear, attention

# (in, out, kernel, stride, padding, dilation, groups, size)
CONVOLUTIONS = [
    (3, 8, (7, 7), (2, 2), (3, 3), (1, 1), 1, (17, 15)),
    (3, 8, (7, 7), (2, 2), (3, 3), (1, 1), 1, (16, 14)),
    (3, 8, (4, 4), (4, 4), (0, 0), (1, 1), 1, (8, 12)),
    (8, 12, (1, 1), (1, 1), (0, 0), (1, 1), 1, (5, 7)),
    (8, 12, (1, 1), (2, 2), (0, 0), (1, 1), 1, (7, 6)),
    (8, 12, (1, 1), (2, 3), (0, 0), (1, 1), 2, (7, 9)),
    (8, 12, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 5)),
    (8, 12, (3, 3), (1, 1), (0, 0), (1, 1), 4, (6, 5)),
    (8, 8, (5, 3), (1, 1), (2, 1), (1, 1), 8, (9, 6)),
    (8, 12, (3, 3), (2, 2), (1, 1), (1, 1), 1, (8, 7)),
    (8, 12, (3, 3), (1, 1), (2, 2), (2, 2), 1, (8, 7)),
    (8, 12, (2, 4), (1, 1), (1, 2), (1, 1), 1, (6, 6)),
    (8, 12, (1, 1), (1, 1), (1, 2), (1, 1), 1, (4, 4)),
    (8, 12, (3, 3), (1, 1), (3, 3), (1, 1), 1, (4, 4)),
]


def weights_of(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)


def gradient(output: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(output, x, weights_of(output))[0]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-12))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: tuple, bias: bool, packs: bool) -> None:  # type: ignore[type-arg]
    before, out, kernel, stride, padding, dilation, groups, size = case
    torch.manual_seed(0)
    weight = torch.randn(out, before // groups, *kernel)
    shift = torch.randn(out) if bias else None
    for batch in (1, 3):
        x = torch.randn(batch, before, *size)
        layer = FrozenConv2d(weight, shift, stride, padding, dilation, groups)
        layer.packs = layer.packs and packs
        plain, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = F.conv2d(plain, weight, shift, stride, padding, dilation, groups)
        found = layer(ours)
        assert found.shape == expected.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert error(found.detach(), expected.detach()) < 1e-5
        assert error(gradient(found, ours), gradient(expected, plain)) < 1e-5


# As above; whether phases reach all of the input.
PHASES = [
    (3, 8, (16, 16), (16, 16), (0, 0), (32, 48), True),
    (4, 8, (3, 3), (2, 3), (0, 1), (8, 9), True),
    (3, 8, (2, 3), (3, 3), (0, 0), (9, 6), True),  # every third column is never read
    (1, 8, (5, 1), (2, 1), (2, 0), (8, 7), True),
    (3, 8, (3, 3), (2, 2), (5, 5), (8, 6), True),
    (3, 8, (3, 3), (2, 2), (1, 1), (7, 8), False),  # 7 is odd
    (3, 8, (2, 2), (4, 4), (0, 0), (10, 12), False),
    (3, 8, (5, 5), (2, 2), (1, 1), (12, 12), False),  # five positions for six of a phase
    (5, 8, (3, 3), (2, 2), (1, 1), (8, 8), False),  # five channels in
]


@pytest.mark.parametrize("case", PHASES)
def test_gradient_by_phases(case: tuple) -> None:  # type: ignore[type-arg]
    before, out, kernel, stride, padding, size, used = case
    torch.manual_seed(0)
    layer = FrozenConv2d(torch.randn(out, before, *kernel), None, stride, padding, (1, 1), 1)
    x = torch.randn(2, before, *size).requires_grad_()
    expected = F.conv2d(x, layer.plain, None, stride, padding)
    phases = layer._phases
    assert (phases is not None and phases.fit(expected.shape, x.shape)) == (used and layer.packs)
    wanted = gradient(expected, x)
    found = layer.back(weights_of(expected), x.shape)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, wanted) < 1e-5
    onto = torch.ones_like(x).contiguous(memory_format=torch.channels_last)
    assert error(layer.back(weights_of(expected), x.shape, onto), wanted + 1) < 1e-5


@pytest.mark.parametrize("case", CONVOLUTIONS[:8])
def test_convolution_in_bfloat16_is_as_good_as_torchs(case: tuple) -> None:  # type: ignore[type-arg]
    before, out, kernel, stride, padding, dilation, groups, size = case
    torch.manual_seed(0)
    rest = (stride, padding, dilation, groups)
    weight, x = torch.randn(out, before // groups, *kernel), torch.randn(3, before, *size)
    narrow, exact = weight.bfloat16(), [x.double().requires_grad_(), x.requires_grad_(), x.bfloat16().requires_grad_()]
    outputs = [F.conv2d(exact[0], weight.double(), None, *rest), FrozenConv2d(narrow, None, *rest)(x)]
    outputs.append(F.conv2d(exact[2], narrow, None, *rest))
    assert outputs[1].dtype == torch.bfloat16
    errors = [error(out.detach(), outputs[0].detach()) for out in outputs[1:]]
    assert errors[0] <= 2 * errors[1] + 1e-3
    gradients = [gradient(out, into) for out, into in zip(outputs, exact, strict=True)]
    errors = [error(found, gradients[0]) for found in gradients[1:]]
    assert errors[0] <= 2 * errors[1] + 1e-3


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 3, 4, 6), (1, 1, 6)])
def test_linear(shape: tuple[int, ...], packs: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(9, 6), torch.randn(9)
    layer = FrozenLinear(weight, bias)
    layer.packs = layer.packs and packs
    for order in ([*range(len(shape))], [*reversed(range(len(shape) - 1)), len(shape) - 1]):
        x = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
        assert x.shape == shape
        plain, ours = x.clone().requires_grad_(), x.detach().requires_grad_()
        expected, found = F.linear(plain, weight, bias), layer(ours)
        assert found.shape == expected.shape
        assert error(found.detach(), expected.detach()) < 1e-5
        assert error(gradient(found, ours), gradient(expected, plain)) < 1e-5


def test_linear_keeps_the_order_of_memory() -> None:
    x = torch.randn(2, 5, 6).transpose(0, 1)
    assert FrozenLinear(torch.randn(9, 6), None)(x).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 4), (3, 2, 197, 64)])
def test_attention_in_bfloat16_is_as_good_as_torchs(shape: tuple[int, ...], scale: float | None) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(shape).bfloat16().double().requires_grad_() for _ in range(3)]
    expected = F.scaled_dot_product_attention(*exact, scale=scale)
    wanted = torch.autograd.grad(expected, exact, torch.linspace(-1, 1, expected.numel()).view(shape).double())
    errors = []
    for function in (attention, F.scaled_dot_product_attention):
        # As heads come out of one projection: strided.
        narrow = [t.detach().bfloat16().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in exact]
        found = function(*narrow, scale=scale)
        assert found.dtype == torch.bfloat16
        weights = torch.linspace(-1, 1, found.numel()).view(shape).bfloat16()
        got = torch.autograd.grad(found, narrow, weights)
        errors.append([error(found.detach(), expected.detach()), *map(error, got, wanted)])
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 2 * plain + 4e-3


def test_attention_of_other_kinds_is_torchs_own() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [t.to(dtype) for t in (q, k, v)]
        assert torch.equal(attention(*tensors), F.scaled_dot_product_attention(*tensors))
