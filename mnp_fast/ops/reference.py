"""Plain torch: what every op means, and what runs where no kernel does. Any device, and float64 for gradient checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mnp_fast.ops.layout import Layout


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def channel_magnitude(weights: list[Tensor]) -> Tensor:
    found = []
    for weight in weights:
        rows = weight.unsqueeze(-1).flatten(1).float().abs()
        # A row without numbers has no largest one; vector_norm loses more of a long one than a sum does.
        largest = rows.amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
        found.append(torch.stack((rows.sum(1), rows.square().sum(1).sqrt(), largest)))
    return torch.cat(found, 1)


def mask_step(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, rate: float, decay: float, penalty: float
) -> None:
    momentum.mul_(decay).add_(grad).add_(penalty * magnitude)
    mask.sub_(rate * momentum).clamp_(0.0, 1.0)


def masked_act(x: Tensor, mask: Tensor, layout: Layout, act: str) -> Tensor:
    out = torch.empty_like(x)
    _memory(out, layout).copy_(_vector(mask, layout) * _activation(_memory(x, layout).to(mask.dtype), act))
    return out


def masked_act_backward(
    grad: Tensor, x: Tensor, mask: Tensor, layout: Layout, act: str, need_grad_x: bool
) -> tuple[Tensor, Tensor]:
    g, wide = _memory(grad, layout).to(mask.dtype), _memory(x, layout).to(mask.dtype)
    grad_x = x.new_empty(0)
    if need_grad_x:
        grad_x = torch.empty_like(x)
        _memory(grad_x, layout).copy_(_vector(mask, layout) * _activation_backward(g, wide, act))
    return grad_x, (g * _activation(wide, act)).sum(1 if layout.channels_last else 2)


def _activation(x: Tensor, act: str) -> Tensor:
    if act == "relu":
        return F.relu(x)
    bounded = x.clamp(-_BOUND, _BOUND)
    if act == "silu":
        y = F.silu(bounded)
    elif act == "quick_gelu":
        y = bounded * torch.sigmoid(1.702 * bounded)
    else:
        y = F.gelu(bounded, approximate=_GELU[act])
    return torch.where(x.abs() <= _BOUND, y, F.relu(x))


def _activation_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    if act == "relu":
        return torch.ops.aten.threshold_backward.default(grad, x, 0)
    bounded = x.clamp(-_BOUND, _BOUND)
    if act == "silu":
        return torch.ops.aten.silu_backward.default(grad, bounded)
    if act == "quick_gelu":
        s = torch.sigmoid(1.702 * bounded)
        return grad * s * (1 + 1.702 * bounded * (1 - s))
    return torch.ops.aten.gelu_backward.default(grad, bounded, approximate=_GELU[act])


# Beyond it an activation is 0 or x, and its derivative 0 or 1, in float64 too; torch's own give NaN for infinities.
_BOUND = 1000.0
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def masked_affine(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    layout: Layout,
    act: str,
) -> Tensor:
    y = _affine(x, mask, scale, center, shift, layout)
    if residual is not None:
        y = y + _memory(residual, layout)
    if act == "relu":
        y = y.relu()
    out = torch.empty_like(x)
    _memory(out, layout).copy_(y)
    return out


def masked_affine_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    layout: Layout,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = _memory(grad, layout).to(mask.dtype)
    if act == "relu":
        sign = _affine(x, mask, scale, center, shift, layout) if y is None else _memory(y, layout)
        g = g.masked_fill(sign <= 0, 0)
    grad_x, grad_residual = x.new_empty(0), x.new_empty(0)
    if need_grad_x:
        grad_x = torch.empty_like(x)
        _memory(grad_x, layout).copy_(g * _vector(mask * scale, layout))
    if need_grad_residual:
        grad_residual = torch.empty_like(x)
        _memory(grad_residual, layout).copy_(g)
    positions = 1 if layout.channels_last else 2
    centered = _memory(x, layout).to(mask.dtype) - _vector(center, layout)
    return grad_x, grad_residual, g.sum(positions), (g * centered).sum(positions)


def masked_batch_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    layout: Layout,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _memory(x, layout).to(mask.dtype)
    samples_and_positions = (0, 1 if layout.channels_last else 2)
    about = wide.mean(samples_and_positions)
    # Of what is left, or the mean is 1e-4 off where it is large: seen on an H100.
    variance, rest = torch.var_mean(wide - _vector(about, layout), samples_and_positions, correction=0)
    mean = about + rest
    rstd = torch.rsqrt(variance + eps)
    return masked_affine(x, mask, weight * rstd, mean, bias, residual, layout, act), mean, rstd


def masked_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    layout: Layout,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = _memory(grad, layout).to(mask.dtype)
    if act == "relu":
        sign = _affine(x, mask, weight * rstd, mean, bias, layout) if y is None else _memory(y, layout)
        g = g.masked_fill(sign <= 0, 0)
    xhat = (_memory(x, layout).to(mask.dtype) - _vector(mean, layout)) * _vector(rstd, layout)
    positions = 1 if layout.channels_last else 2
    grad_x, grad_residual = x.new_empty(0), x.new_empty(0)
    if need_grad_x:
        grad_x = torch.empty_like(x)
        mean_g, mean_gx = g.mean((0, positions)), (g * xhat).mean((0, positions))
        centered = g - _vector(mean_g, layout) - xhat * _vector(mean_gx, layout)
        _memory(grad_x, layout).copy_(centered * _vector(mask * weight * rstd, layout))
    if need_grad_residual:
        grad_residual = torch.empty_like(x)
        _memory(grad_residual, layout).copy_(g)
    return grad_x, grad_residual, g.sum(positions), (g * xhat).sum(positions)


def _affine(x: Tensor, mask: Tensor, scale: Tensor, center: Tensor, shift: Tensor, layout: Layout) -> Tensor:
    a = mask * scale
    b = shift - a * center
    # A product with a float32 vector widens bfloat16 and float16.
    return _memory(x, layout) * _vector(a, layout) + _vector(b, layout)


def _memory(tensor: Tensor, layout: Layout) -> Tensor:
    """Dense tensor as (n, s, c) or (n, c, s), in the order of its memory."""
    n, c, s, channels_last = layout
    shape, strides = ((n, s, c), (s * c, c, 1)) if channels_last else ((n, c, s), (c * s, s, 1))
    return tensor.as_strided(shape, strides)


def _vector(v: Tensor, layout: Layout) -> Tensor:
    return v if layout.channels_last else v.unsqueeze(1)
