"""masked_act: schema, argument checks, fake kernels and autograd. The kernels are in the backends.

Per-sample sums for Taylor saliency and Fisher information: `torch.ops.mnp_fast.masked_act_backward` returns, for every
sample and channel, `sum_gact` = sum of grad·act(x) over the positions. That is the gradient of the mask sample by
sample: its mean is the Taylor term, its mean square the Fisher term. A mask that is watched hands it on:
`mnp_fast.ops.samples`.
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

# In the order of csrc/act.h.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")


def masked_act(x: Tensor, mask: Tensor, *, act: str, channel_dim: int = -1) -> Tensor:
    """y = mask·act(x), per channel, in one pass, computed in float32: the hidden units of an MLP block under a mask.

    Infinities give the limits: inf, and for -inf 0 within 3e-7, where torch's own activations may give NaN. NaN stays
    NaN.

    Args:
        x: float32, bfloat16 or float16, (N, ..., C) with `channel_dim` -1, (N, C, ...) with 1. Contiguous,
            channels_last and channels_last_3d memory is used as it is, any other is copied first.
        mask: float32, (C,), on the device of x. float64 with a float64 x, reference only.
        act: "gelu" (with erf), "gelu_tanh" (its approximation with tanh), "relu", "silu" or "quick_gelu"
            (x·sigmoid(1.702·x)).
        channel_dim: -1 or 1.

    Returns:
        Shape, dtype and memory order of x. Differentiable once, in x and mask; only these two are kept for that.

    Raises:
        BackendError: arguments that do not fit, or a forced backend that cannot run.
    """
    return _forward(x, mask, channel_dim, act)


def _run(x: Tensor, mask: Tensor, channel_dim: int, act: str) -> Tensor:
    _check(x, mask, None, channel_dim, act)
    x, layout = dense(x, channel_dim)
    run = registry.kernel("masked_act", x.device, x.dtype)
    y: Tensor = run(x, mask.contiguous(), layout, act)
    return y


def _run_backward(
    grad: Tensor, x: Tensor, mask: Tensor, channel_dim: int, act: str, need_grad_x: bool
) -> tuple[Tensor, Tensor]:
    """Returns grad_x (of size 0 where not needed) and sum_gact, (N, C), in one pass over grad and x."""
    _check(x, mask, grad, channel_dim, act)
    x, layout = dense(x, channel_dim)
    run = registry.kernel("masked_act_backward", x.device, x.dtype)
    result: tuple[Tensor, Tensor] = run(like(grad, x), x, mask.contiguous(), layout, act, need_grad_x)
    return result


_forward_op = torch.library.custom_op(
    "mnp_fast::masked_act",
    _run,
    mutates_args=(),
    schema="(Tensor x, Tensor mask, int channel_dim, str act) -> Tensor",
)
_backward_op = torch.library.custom_op(
    "mnp_fast::masked_act_backward",
    _run_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor mask, int channel_dim, str act, bool need_grad_x) -> (Tensor, Tensor)",
)


@_forward_op.register_fake
def _forward_fake(x: Tensor, mask: Tensor, channel_dim: int, act: str) -> Tensor:
    _check(x, mask, None, channel_dim, act)
    return torch.empty_like(dense(x, channel_dim)[0])


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, x: Tensor, mask: Tensor, channel_dim: int, act: str, need_grad_x: bool
) -> tuple[Tensor, Tensor]:
    _check(x, mask, grad, channel_dim, act)
    x, layout = dense(x, channel_dim)
    return torch.empty_like(x) if need_grad_x else x.new_empty(0), mask.new_empty((layout.n, layout.c))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, ctx.channel_dim, ctx.act = inputs
    ctx.save_for_backward(x, mask)
    ctx.sink = sink_of(mask)


def _gradients(run: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """run: the backward, through the dispatcher or not."""
    x, mask = ctx.saved_tensors
    need_x, need_mask = ctx.needs_input_grad[:2]
    grad_x, sum_gact = run(grad, x, mask, ctx.channel_dim, ctx.act, need_x)
    if ctx.sink is not None:
        ctx.sink(x.shape, sum_gact)
    return grad_x if need_x else None, sum_gact.sum(0) if need_mask else None, None, None


_forward_op.register_autograd(partial(_gradients, torch.ops.mnp_fast.masked_act_backward.default), setup_context=_save)
_forward = short_way(torch.ops.mnp_fast.masked_act.default, _run, _save, partial(_gradients, _run_backward))


def _check(x: Tensor, mask: Tensor, grad: Tensor | None, channel_dim: int, act: str) -> None:
    check_act("masked_act", act, ACTIVATIONS)
    check_tensors("masked_act", x, ("mask",), (mask,), (grad,), channel_dim)
