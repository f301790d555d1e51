"""Results beyond the cache are written past it: the same bits as for the samples one by one, which are not."""

from __future__ import annotations

import pytest
import torch
from channel_cases import providers
from torch import Tensor

from mnp_fast.ops import masked_act, masked_affine, masked_batch_norm

SHAPE = (3, 5, 977, 601)  # 35 MB in float32, 18 MB in bfloat16; no row but the first begins at a whole vector
FEW_CHANNELS = (3, 977 * 601, 5)
CPU = [p for dtype in (torch.float32, torch.bfloat16) for p in providers("masked_affine", dtype) if "cpu-" in p.id]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, memory: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    order = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    return [torch.randn(shape, generator=generator).to(dtype, memory_format=order) for _ in range(count)]


def vectors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(5, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), CPU)
def test_masked_affine(provider, dtype, memory):
    x, residual, grad = numbers(SHAPE, dtype, memory, 3)
    rest = vectors(4)

    def run(part: slice) -> list[Tensor]:
        own = [t[part].detach().requires_grad_() for t in (x, residual)]
        y = masked_affine(own[0], *rest, own[1], act="relu")
        return [y.detach(), *torch.autograd.grad(y, own, grad[part])]

    with provider.force():
        whole, parts = run(slice(None)), [run(slice(i, i + 1)) for i in range(3)]
    for name, one, few in zip(("y", "grad_x", "grad_residual"), whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(few)), name


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize(("provider", "dtype"), CPU)
def test_masked_act(provider, dtype, act):
    x, grad = numbers(FEW_CHANNELS, dtype, "contiguous", 2)
    (mask,) = vectors(1)

    def run(part: slice) -> list[Tensor]:
        own = x[part].detach().requires_grad_()
        y = masked_act(own, mask, channel_dim=-1, act=act)
        return [y.detach(), *torch.autograd.grad(y, own, grad[part])]

    with provider.force():
        whole, parts = run(slice(None)), [run(slice(i, i + 1)) for i in range(3)]
    for name, one, few in zip(("y", "grad_x"), whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(few)), name


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), CPU)
def test_gradient_of_masked_batch_norm(provider, dtype, memory):
    x, grad = numbers(SHAPE, dtype, memory, 2)
    mask, weight, bias = vectors(3)
    x.requires_grad_()
    with provider.force():
        (ours,) = torch.autograd.grad(masked_batch_norm(x, mask, weight, bias, eps=1e-5), x, grad)
    exact = x.detach().double().requires_grad_()
    y = torch.nn.functional.batch_norm(exact, None, None, (mask * weight).double(), bias.double(), True, 0.0, 1e-5)
    (theirs,) = torch.autograd.grad(y, exact, grad.double())
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=1e-5)
