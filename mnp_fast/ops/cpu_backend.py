"""The C++ kernels for the CPU: float32 and bfloat16, in the widest instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from mnp_fast.errors import BackendError
from mnp_fast.ops import native, registry
from mnp_fast.ops.layout import Layout
from mnp_fast.ops.op_masked_act import ACTIVATIONS

_DTYPES = (torch.float32, torch.bfloat16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it has float32 and bfloat16 kernels, not {dtype}"
    return native.info_problem() or native.load("mnp_fast_cpu")


def usable_isas() -> list[str]:
    """Instruction sets that this build has and this processor runs, narrowest first."""
    module = native.info_module()
    return [] if module is None else list(module.usable_isas())


def channel_magnitude(weights: list[Tensor]) -> Tensor:
    found: Tensor = torch.ops.mnp_fast_cpu.channel_magnitude.default(weights, _isa(registry.requested_cpu_isa()))
    return found


def mask_step(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, rate: float, decay: float, penalty: float
) -> None:
    isa = _isa(registry.requested_cpu_isa())
    torch.ops.mnp_fast_cpu.mask_step.default(mask, momentum, grad, magnitude, rate, decay, penalty, isa)


def masked_act(x: Tensor, mask: Tensor, layout: Layout, act: str) -> Tensor:
    y: Tensor = torch.ops.mnp_fast_cpu.masked_act.default(
        x, mask, *layout, ACTIVATIONS.index(act), _isa(registry.requested_cpu_isa())
    )
    return y


def masked_act_backward(
    grad: Tensor, x: Tensor, mask: Tensor, layout: Layout, act: str, need_grad_x: bool
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.mnp_fast_cpu.masked_act_backward.default(
        grad, x, mask, *layout, ACTIVATIONS.index(act), need_grad_x, _isa(registry.requested_cpu_isa())
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
    y: Tensor = torch.ops.mnp_fast_cpu.masked_affine.default(
        x, mask, scale, center, shift, residual, *layout, act == "relu", _isa(registry.requested_cpu_isa())
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
    vectors = (mask, scale, center, shift)
    return masked_affine_backward_(grad, x, y, None, *vectors, layout, act, need_grad_x, need_grad_residual, False)


def masked_affine_signed(
    x: Tensor, mask: Tensor, scale: Tensor, center: Tensor, shift: Tensor, residual: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.mnp_fast_cpu.masked_affine_signed.default(
        x, mask, scale, center, shift, residual, *layout, _isa(registry.requested_cpu_isa())
    )
    return result


def masked_affine_backward_(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    signs: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    layout: Layout,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
    over: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_residual, sum_g, sum_gx = torch.ops.mnp_fast_cpu.masked_affine_backward_.default(
        grad,
        x,
        y,
        signs,
        mask,
        scale,
        center,
        shift,
        *layout,
        act == "relu",
        need_grad_x,
        need_grad_residual,
        over,
        _isa(registry.requested_cpu_isa()),
    )
    if over and need_grad_residual:
        grad_residual = grad
    elif over:
        grad_x = grad
    return grad_x, grad_residual, sum_g, sum_gx


def winograd(x: Tensor, u: Tensor, out: int, padding: Sequence[int]) -> Tensor:
    y: Tensor = torch.ops.mnp_fast_cpu.winograd.default(x, u, out, *padding, _isa(registry.requested_cpu_isa()))
    return y


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
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.mnp_fast_cpu.masked_batch_norm.default(
        x, mask, weight, bias, residual, *layout, eps, act == "relu", _isa(registry.requested_cpu_isa())
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
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.mnp_fast_cpu.masked_batch_norm_backward.default(
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
        _isa(registry.requested_cpu_isa()),
    )
    return result


@cache
def _isa(requested: str) -> int:
    module = native.info_module()
    assert module is not None, "why_not() looks for it first"
    usable = module.usable_isas()
    isa = usable[-1] if requested == "auto" else requested
    if isa not in usable:
        raise BackendError(
            f"instruction set {isa!r} was forced (MNP_FAST_CPU_ISA or force_cpu_isa), but this processor runs "
            f"{', '.join(usable)}: choose one of them, or auto"
        )
    code: int = module.isa_code(isa)
    return code
