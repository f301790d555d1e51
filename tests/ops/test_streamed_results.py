"""Results beyond the cache are written past it: the same bits as for the samples one by one, which are not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from channel_cases import providers
from torch import Tensor

from mnp_fast.ops import masked_act, masked_affine, masked_batch_norm, op_masked_affine

# 35 MB in float32, 18 MB in bfloat16; no row but the first begins at a whole vector
SHAPE = (3, 5, 977, 601)
FEW_CHANNELS = (3, 977 * 601, 5)
CPU = [p for dtype in (torch.float32, torch.bfloat16) for p in providers("masked_affine", dtype) if "cpu-" in p.id]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, memory: str, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    order = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    return [torch.randn(shape, generator=generator).to(dtype, memory_format=order) for _ in range(count)]


def vectors(count: int, channels: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(channels, generator=generator) for _ in range(count)]


def with_heavy_ends(grad: Tensor) -> Tensor:
    """Numbers at both ends of every row, where a kernel has its heads and tails, that no sum can lack unnoticed."""
    memory = grad.permute(0, 2, 3, 1) if grad.dim() == 4 and not grad.is_contiguous() else grad
    # A row: all positions of a channel, or with the channels last all of a sample.
    rows = memory.flatten(1) if memory is not grad or grad.dim() == 3 else memory.flatten(2)
    rows[..., :16] = rows[..., -16:] = 300.0
    return grad


def same_but_for_rounding(one: Tensor, parts: Sequence[Tensor]) -> None:
    """A sum of all samples, against those of the samples."""
    torch.testing.assert_close(one, sum(parts), rtol=1e-4, atol=30.0)  # of numbers that reach 300


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), CPU)
def test_masked_affine(provider, dtype, memory):
    x, residual, grad = numbers(SHAPE, dtype, memory, 3)
    with_heavy_ends(grad)
    mask, *rest = vectors(4)

    def run(part: slice) -> list[Tensor]:
        own = [t.detach().requires_grad_() for t in (x[part], residual[part], mask)]
        y = masked_affine(own[0], own[2], *rest, own[1], act="relu")
        return [y.detach(), *torch.autograd.grad(y, own, grad[part])]

    with provider.force():
        whole, parts = run(slice(None)), [run(slice(i, i + 1)) for i in range(3)]
    *_, few = zip(*parts, strict=True)
    same_but_for_rounding(whole.pop(), few)
    for name, one, few in zip(("y", "grad_x", "grad_residual"), whole, zip(*parts, strict=True), strict=False):
        assert torch.equal(one, torch.cat(few)), name


@pytest.mark.parametrize(("provider", "dtype"), CPU)
def test_masked_affine_by_its_signs(provider, dtype):
    """As mask learning runs it: the signs in bits, and one gradient written over another."""
    x, residual, grad = numbers((3, 16, 547, 601), dtype, "channels_last", 3)
    with_heavy_ends(grad)
    given = vectors(4, 16)

    def run(part: slice) -> tuple[Tensor, ...]:
        y, sign = op_masked_affine.run_keeping_sign(x[part], *given, residual[part], "relu")
        assert sign.dtype == torch.uint8
        own = grad[part].clone()
        return y, *op_masked_affine.run_backward_(own, x[part], sign, *given, "relu", True, True, True)

    with provider.force():
        whole, parts = run(slice(None)), [run(slice(i, i + 1)) for i in range(3)]
    for name, one, few in zip(("y", "grad_x", "grad_residual"), whole, zip(*parts, strict=True), strict=False):
        assert torch.equal(one, torch.cat(few)), name
    for one, few in zip(whole[3:], list(zip(*parts, strict=True))[3:], strict=True):
        torch.testing.assert_close(one, torch.cat(few), rtol=1e-4, atol=30.0)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize(("shape", "channel_dim"), [(FEW_CHANNELS, -1), (SHAPE, 1)])
@pytest.mark.parametrize(("provider", "dtype"), CPU)
def test_masked_act(provider, dtype, shape, channel_dim, act):
    x, grad = numbers(shape, dtype, "contiguous", 2)
    with_heavy_ends(grad)
    (mask,) = vectors(1)

    def run(part: slice) -> list[Tensor]:
        own = [x[part].detach().requires_grad_(), mask.detach().requires_grad_()]
        y = masked_act(*own, channel_dim=channel_dim, act=act)
        return [y.detach(), *torch.autograd.grad(y, own, grad[part])]

    with provider.force():
        whole, parts = run(slice(None)), [run(slice(i, i + 1)) for i in range(3)]
    *_, few = zip(*parts, strict=True)
    same_but_for_rounding(whole.pop(), few)
    for name, one, few in zip(("y", "grad_x"), whole, zip(*parts, strict=True), strict=False):
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
