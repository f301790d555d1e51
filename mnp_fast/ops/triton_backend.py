"""The Triton kernels: float32, bfloat16 and float16 on GPUs; on a CPU under TRITON_INTERPRET=1, for tests.

Kernels are in triton_<op>.py. This module is imported without Triton: those are imported once why_not() is None.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mnp_fast.ops.layout import Layout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16 kernels, not {dtype}"
    if device.type not in ("cuda", "cpu"):
        return f"it runs on CUDA devices, not on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it is tested on compute capability 8.0 and newer, and this device is older"
    reason = triton_problem()
    if reason is None and device.type == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            return "it runs on CUDA devices, not on cpu (save in the interpreter of TRITON_INTERPRET=1)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    return reason


@cache
def triton_problem() -> str | None:
    """Why Triton cannot be imported, None if it can."""
    try:
        from triton import knobs  # noqa: F401
    except Exception as error:  # whatever an old or broken one raises
        return f"triton cannot be imported ({error}): pip install 'triton>=3.6'"
    return None


def channel_magnitude(weights: list[Tensor]) -> Tensor:
    from mnp_fast.ops import triton_channel_magnitude as kernels

    return kernels.forward(weights)


def mask_step(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, rate: float, decay: float, penalty: float
) -> None:
    from mnp_fast.ops import triton_mask_step as kernels

    kernels.step(mask, momentum, grad, magnitude, rate, decay, penalty)


def masked_act(x: Tensor, mask: Tensor, layout: Layout, act: str) -> Tensor:
    from mnp_fast.ops import triton_masked_act as kernels

    return kernels.forward(x, mask, layout, act)


def masked_act_backward(
    grad: Tensor, x: Tensor, mask: Tensor, layout: Layout, act: str, need_grad_x: bool
) -> tuple[Tensor, Tensor]:
    from mnp_fast.ops import triton_masked_act as kernels

    return kernels.backward(grad, x, mask, layout, act, need_grad_x)


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
    from mnp_fast.ops import triton_masked_affine as kernels

    return kernels.forward(x, mask, scale, center, shift, residual, layout, act)


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
    from mnp_fast.ops import triton_masked_affine as kernels

    return kernels.backward(grad, x, y, mask, scale, center, shift, layout, act, need_grad_x, need_grad_residual)


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
    from mnp_fast.ops import triton_masked_batch_norm as kernels

    return kernels.forward(x, mask, weight, bias, residual, layout, eps, act)


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
    from mnp_fast.ops import triton_masked_batch_norm as kernels

    return kernels.backward(grad, x, y, mask, weight, bias, mean, rstd, layout, act, need_grad_x, need_grad_residual)
