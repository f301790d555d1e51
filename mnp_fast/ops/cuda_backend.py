"""The CUDA kernels: float32, bfloat16 and float16 on NVIDIA GPUs of compute capability 8.0 and newer."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mnp_fast.ops import native
from mnp_fast.ops.layout import Layout
from mnp_fast.ops.op_masked_act import ACTIVATIONS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16 kernels, not {dtype}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason = library_problem()
    if reason is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        reason = torch.ops.mnp_fast_cuda.device_problem(index) or None
    return reason


@cache
def library_problem() -> str | None:
    """Why the library cannot be loaded, None once it is; what the build says of it where it was left out."""
    return native.load("mnp_fast_cuda", native.build_info().get("cuda_reason", ""))


def channel_magnitude(weights: list[Tensor]) -> Tensor:
    found: Tensor = torch.ops.mnp_fast_cuda.channel_magnitude.default(weights, _stream(weights[0]))
    return found


def mask_step(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, rate: float, decay: float, penalty: float
) -> None:
    stream = _stream(mask)
    torch.ops.mnp_fast_cuda.mask_step.default(mask, momentum, grad, magnitude, rate, decay, penalty, stream)


def masked_act(x: Tensor, mask: Tensor, layout: Layout, act: str) -> Tensor:
    y: Tensor = torch.ops.mnp_fast_cuda.masked_act.default(x, mask, *layout, ACTIVATIONS.index(act), _stream(x))
    return y


def masked_act_backward(
    grad: Tensor, x: Tensor, mask: Tensor, layout: Layout, act: str, need_grad_x: bool
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.mnp_fast_cuda.masked_act_backward.default(
        grad, x, mask, *layout, ACTIVATIONS.index(act), need_grad_x, _stream(x)
    )
    return result


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
    y: Tensor = torch.ops.mnp_fast_cuda.masked_affine.default(
        x, mask, scale, center, shift, residual, *layout, act == "relu", _stream(x)
    )
    return y


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
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.mnp_fast_cuda.masked_affine_backward.default(
        grad,
        x,
        y,
        mask,
        scale,
        center,
        shift,
        *layout,
        act == "relu",
        need_grad_x,
        need_grad_residual,
        _stream(x),
    )
    return result


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
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.mnp_fast_cuda.masked_batch_norm.default(
        x, mask, weight, bias, residual, *layout, eps, act == "relu", _stream(x)
    )
    return result


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
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.mnp_fast_cuda.masked_batch_norm_backward.default(
        grad,
        x,
        y,
        mask,
        weight * rstd,
        bias,
        mean,
        rstd,
        *layout,
        act == "relu",
        need_grad_x,
        need_grad_residual,
        _stream(x),
    )
    return result


def _stream(x: Tensor) -> int:
    # The stable interface has had the native stream since torch 2.13 only, so it is handed over from here.
    stream: int = torch.cuda.current_stream(x.device).cuda_stream
    return stream
