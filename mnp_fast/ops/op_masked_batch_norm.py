"""masked_batch_norm: schema, argument checks, fake kernels and autograd. The kernels are in the backends.

The op itself, `torch.ops.mnp_fast.masked_batch_norm`, also returns the mean and the reciprocal standard deviation of
every channel. `torch.ops.mnp_fast.masked_batch_norm_backward` returns, for every sample and channel, `sum_g` = sum of
g' and `sum_gx` = sum of g'·xhat, g' being the gradient behind the activation: `weight * sum_gx` is the gradient of the
mask sample by sample, as far as it does not go through the statistics of the batch, which do not depend on the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mnp_fast.errors import BackendError
from mnp_fast.ops import registry
from mnp_fast.ops.checks import check_act, check_tensors
from mnp_fast.ops.eager import short_way
from mnp_fast.ops.layout import Layout, dense, like

ACTIVATIONS = ("none", "relu")


def masked_batch_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "none",
) -> Tensor:
    """BatchNorm with the statistics of the batch, under a mask: y = act(mask·weight·xhat + bias + residual).

    xhat = (x - mean)/sqrt(var + eps), mean and biased variance of a channel over samples and positions. Mask 0 leaves
    exactly `bias`, which is what pruning leaves of the channel. Running statistics are neither used nor kept.

    Sums are in float32 of differences from a number within the data, so that a mean that is large beside the standard
    deviation costs no precision, and in an order that does not depend on the number of threads.

    Args:
        x: float32, bfloat16 or float16, (N, C, ...). Contiguous, channels_last and channels_last_3d memory is used as
            it is, any other is copied first. Empty, or at least two values a channel.
        mask, weight, bias: float32, (C,), on the device of x. float64 with a float64 x, reference only.
        residual: shape and dtype of x, added before the activation.
        eps: added to the variance.
        act: "none" or "relu".

    Returns:
        Shape, dtype and memory order of x. Differentiable once, in every tensor argument, through the statistics too.

    Raises:
        BackendError: arguments that do not fit, one value a channel, or a forced backend that cannot run.
    """
    y: Tensor = _forward(x, mask, weight, bias, residual, eps, act)[0]
    return y


def _run(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, mean and rstd, the last two (C,); zeros where x is empty. They carry no gradient."""
    x, layout = _check(x, (mask, weight, bias), (residual,), act)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(mask), torch.zeros_like(mask)
    run = registry.kernel("masked_batch_norm", x.device, x.dtype)
    result: tuple[Tensor, Tensor, Tensor] = run(
        x,
        mask.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        None if residual is None else like(residual, x),
        layout,
        eps,
        act,
    )
    return result


def _run_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns grad_x, grad_residual (both of size 0 where not needed), sum_g and sum_gx, the last two (N, C).

    `y` is the output of the forward op, needed with act "relu" and a residual; without a residual the sign is
    recomputed from x. grad_residual is g'; with act "none" that is `grad` itself and need not be asked for.
    """
    x, layout = _check(x, (mask, weight, bias, mean, rstd), (grad, y), act)
    if x.numel() == 0:
        return _backward_outputs(x, mask, layout, need_grad_x, need_grad_residual)
    run = registry.kernel("masked_batch_norm_backward", x.device, x.dtype)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = run(
        like(grad, x),
        x,
        None if y is None else like(y, x),
        mask.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        layout,
        act,
        need_grad_x,
        need_grad_residual,
    )
    return result


def _backward_outputs(
    x: Tensor, mask: Tensor, layout: Layout, need_grad_x: bool, need_grad_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_grad_x else x.new_empty(0),
        torch.empty_like(x) if need_grad_residual else x.new_empty(0),
        mask.new_zeros((layout.n, layout.c)),
        mask.new_zeros((layout.n, layout.c)),
    )


_forward_op = torch.library.custom_op(
    "mnp_fast::masked_batch_norm",
    _run,
    mutates_args=(),
    schema="(Tensor x, Tensor mask, Tensor weight, Tensor bias, Tensor? residual, float eps, str act) "
    "-> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "mnp_fast::masked_batch_norm_backward",
    _run_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? y, Tensor mask, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "str act, bool need_grad_x, bool need_grad_residual) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _forward_fake(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, layout = _check(x, (mask, weight, bias), (residual,), act)
    return torch.empty_like(x), mask.new_empty(layout.c), mask.new_empty(layout.c)


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, layout = _check(x, (mask, weight, bias, mean, rstd), (grad, y), act)
    return _backward_outputs(x, mask, layout, need_grad_x, need_grad_residual)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, weight, bias, residual, _, ctx.act = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # The sign behind a relu follows from x alone, unless something was added to it.
    ctx.save_for_backward(x, y if ctx.act == "relu" and residual is not None else None, mask, weight, bias, mean, rstd)


def _gradients(run: Callable[..., Any], ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """run: the backward, through the dispatcher or not."""
    x, y, mask, weight, bias, mean, rstd = ctx.saved_tensors
    need_x, need_mask, need_weight, need_bias, need_residual = ctx.needs_input_grad[:5]
    through_relu = ctx.act == "relu"
    grad_x, grad_residual, sum_g, sum_gx = run(
        grad, x, y, mask, weight, bias, mean, rstd, ctx.act, need_x, need_residual and through_relu
    )
    total_gx = sum_gx.sum(0) if need_mask or need_weight else None
    return (
        grad_x if need_x else None,
        weight * total_gx if need_mask else None,
        mask * total_gx if need_weight else None,
        sum_g.sum(0) if need_bias else None,
        (grad_residual if through_relu else grad) if need_residual else None,
        None,
        None,
    )


_forward_op.register_autograd(
    partial(_gradients, torch.ops.mnp_fast.masked_batch_norm_backward.default), setup_context=_save
)
_forward = short_way(torch.ops.mnp_fast.masked_batch_norm.default, _run, _save, partial(_gradients, _run_backward))


def _check(
    x: Tensor, vectors: tuple[Tensor, ...], others: tuple[Tensor | None, ...], act: str
) -> tuple[Tensor, Layout]:
    """`x` dense, and its layout. `others`: tensors that must look like x."""
    check_act("masked_batch_norm", act, ACTIVATIONS)
    names = ("mask", "weight", "bias", "mean", "rstd")[: len(vectors)]
    check_tensors("masked_batch_norm", x, names, vectors, others, 1)
    x, layout = dense(x, 1)
    if layout.c and layout.n * layout.s == 1:
        raise BackendError(
            f"masked_batch_norm: x of shape {tuple(x.shape)} has one value a channel, which has no variance: give it "
            f"two samples or more, or use masked_affine with the running statistics"
        )
    return x, layout
