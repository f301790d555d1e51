"""masked_affine: schema, argument checks, fake kernels and autograd. The kernels are in the backends.

Per-sample sums for Taylor saliency and Fisher information: `torch.ops.mnp_fast.masked_affine_backward` returns, for
every sample and channel, `sum_g` = sum of g' and `sum_gx` = sum of g'·(x - center), g' being the gradient behind the
activation. `scale * sum_gx` is the gradient of the mask sample by sample: its mean is the Taylor term, its mean square
the Fisher term. A mask that is watched hands it on: `mnp_fast.ops.samples`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mnp_fast.ops import registry
from mnp_fast.ops.checks import check_act, check_tensors
from mnp_fast.ops.eager import short_way
from mnp_fast.ops.layout import dense, like
from mnp_fast.ops.samples import sink_of

ACTIVATIONS = ("none", "relu")


def masked_affine(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    channel_dim: int = 1,
    act: str = "none",
) -> Tensor:
    """y = act(mask·scale·(x - center) + shift + residual), per channel, in one pass.

    With `center`, mask 0 leaves exactly `shift`, which is what pruning leaves of each kind of neuron:

    - BatchNorm with frozen statistics: scale = gamma/sqrt(var + eps), center = running_mean, shift = beta;
    - convolution without norm: scale = 1, center = shift = bias;
    - MLP hidden unit or attention head: scale = 1, center = shift = 0.

    The kernels compute a = mask·scale and b = shift - a·center per channel, then a·x + b, in float32.

    Args:
        x: float32, bfloat16 or float16, (N, C, ...) with `channel_dim` 1, (N, ..., C) with -1. Contiguous,
            channels_last and channels_last_3d memory is used as it is, any other is copied first.
        mask, scale, center, shift: float32, (C,), on the device of x. float64 with a float64 x, reference only.
        residual: shape and dtype of x, added before the activation.
        channel_dim: 1 or -1.
        act: "none" or "relu".

    Returns:
        Shape, dtype and memory order of x. Differentiable once, in every tensor argument.

    Raises:
        BackendError: arguments that do not fit, or a forced backend that cannot run.
    """
    return _forward(x, mask, scale, center, shift, residual, channel_dim, act)


def run(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    channel_dim: int,
    act: str,
) -> Tensor:
    _check(x, (mask, scale, center, shift), (residual,), channel_dim, act)
    x, layout = dense(x, channel_dim)
    run = registry.kernel("masked_affine", x.device, x.dtype)
    y: Tensor = run(
        x,
        mask.contiguous(),
        scale.contiguous(),
        center.contiguous(),
        shift.contiguous(),
        None if residual is None else like(residual, x),
        layout,
        act,
    )
    return y


def run_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    channel_dim: int,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns grad_x, grad_residual (both of size 0 where not needed), sum_g and sum_gx, the last two (N, C).

    `y` is the output of the forward op, needed with act "relu" and a residual; without a residual the sign is
    recomputed from x. grad_residual is g'; with act "none" that is `grad` itself and need not be asked for.
    """
    _check(x, (mask, scale, center, shift), (grad, y), channel_dim, act)
    x, layout = dense(x, channel_dim)
    run = registry.kernel("masked_affine_backward", x.device, x.dtype)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = run(
        like(grad, x),
        x,
        None if y is None else like(y, x),
        mask.contiguous(),
        scale.contiguous(),
        center.contiguous(),
        shift.contiguous(),
        layout,
        act,
        need_grad_x,
        need_grad_residual,
    )
    return result


def run_keeping_sign(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor | None]:
    """`run` with channel_dim 1, and what `run_backward_` needs to know the sign behind a relu.

    That is one bit a number, uint8 (numel / 8,), where the backend has a kernel for it, else the result itself; None
    where the sign follows from x.
    """
    if residual is None or act != "relu":
        return run(x, mask, scale, center, shift, residual, 1, act), None
    x, layout = dense(x, 1)
    kernel = registry.beside("masked_affine", "masked_affine_signed", x.device, x.dtype)
    if kernel is None or not layout.channels_last or layout.c % 16:
        y = run(x, mask, scale, center, shift, residual, 1, act)
        return y, y
    _check(x, (mask, scale, center, shift), (residual,), 1, act)
    found: tuple[Tensor, Tensor] = kernel(
        x, mask.contiguous(), scale.contiguous(), center.contiguous(), shift.contiguous(), like(residual, x), layout
    )
    return found


def run_backward_(
    grad: Tensor,
    x: Tensor,
    sign: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
    over: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`run_backward` with channel_dim 1 and the sign from `run_keeping_sign`.

    over: nobody else needs `grad`, which one of the results may be written over. Reading two tensors and writing over
    one takes half to two thirds of the time of writing to a third (docs/decisions.md).
    """
    x, layout = dense(x, 1)
    kernel = registry.beside("masked_affine_backward", "masked_affine_backward_", x.device, x.dtype)
    if kernel is None:
        return run_backward(grad, x, sign, mask, scale, center, shift, 1, act, need_grad_x, need_grad_residual)
    bits = sign is not None and sign.dtype == torch.uint8
    result: tuple[Tensor, Tensor, Tensor, Tensor] = kernel(
        like(grad, x),
        x,
        None if bits or sign is None else like(sign, x),
        sign if bits else None,
        mask.contiguous(),
        scale.contiguous(),
        center.contiguous(),
        shift.contiguous(),
        layout,
        act,
        need_grad_x,
        need_grad_residual,
        over,
    )
    return result


_forward_op = torch.library.custom_op(
    "mnp_fast::masked_affine",
    run,
    mutates_args=(),
    schema="(Tensor x, Tensor mask, Tensor scale, Tensor center, Tensor shift, Tensor? residual, "
    "int channel_dim, str act) -> Tensor",
)
_backward_op = torch.library.custom_op(
    "mnp_fast::masked_affine_backward",
    run_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? y, Tensor mask, Tensor scale, Tensor center, Tensor shift, "
    "int channel_dim, str act, bool need_grad_x, bool need_grad_residual) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _forward_fake(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    channel_dim: int,
    act: str,
) -> Tensor:
    _check(x, (mask, scale, center, shift), (residual,), channel_dim, act)
    return torch.empty_like(dense(x, channel_dim)[0])


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    channel_dim: int,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, (mask, scale, center, shift), (grad, y), channel_dim, act)
    x, layout = dense(x, channel_dim)
    return (
        torch.empty_like(x) if need_grad_x else x.new_empty(0),
        torch.empty_like(x) if need_grad_residual else x.new_empty(0),
        mask.new_empty((layout.n, layout.c)),
        mask.new_empty((layout.n, layout.c)),
    )


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, scale, center, shift, residual, ctx.channel_dim, ctx.act = inputs
    # The sign behind a relu follows from x alone, unless something was added to it.
    y = output if ctx.act == "relu" and residual is not None else None
    ctx.save_for_backward(x, y, mask, scale, center, shift)
    ctx.sink = sink_of(mask)


def gradients(run: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """run: the backward, through the dispatcher or not."""
    x, y, mask, scale, center, shift = ctx.saved_tensors
    need_x, need_mask, need_scale, need_center, need_shift, need_residual = ctx.needs_input_grad[:6]
    through_relu = ctx.act == "relu"
    grad_x, grad_residual, sum_g, sum_gx = run(
        grad, x, y, mask, scale, center, shift, ctx.channel_dim, ctx.act, need_x, need_residual and through_relu
    )
    if ctx.sink is not None:
        ctx.sink(x.shape, scale * sum_gx)
    total_g = sum_g.sum(0) if need_center or need_shift else None
    total_gx = sum_gx.sum(0) if need_mask or need_scale else None
    return (
        grad_x if need_x else None,
        scale * total_gx if need_mask else None,
        mask * total_gx if need_scale else None,
        -mask * scale * total_g if need_center else None,
        total_g if need_shift else None,
        (grad_residual if through_relu else grad) if need_residual else None,
        None,
        None,
    )


_forward_op.register_autograd(partial(gradients, torch.ops.mnp_fast.masked_affine_backward.default), setup_context=save)
_forward = short_way(torch.ops.mnp_fast.masked_affine.default, run, save, partial(gradients, run_backward))


def _check(
    x: Tensor, vectors: tuple[Tensor, ...], others: tuple[Tensor | None, ...], channel_dim: int, act: str
) -> None:
    """`others`: tensors that must look like x."""
    check_act("masked_affine", act, ACTIVATIONS)
    check_tensors("masked_affine", x, ("mask", "scale", "center", "shift"), vectors, others, channel_dim)
