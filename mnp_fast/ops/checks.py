"""Checks of arguments that the ops with one coefficient a channel share. All raise BackendError."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnp_fast.errors import BackendError

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def check_act(op: str, act: str, known: Sequence[str]) -> None:
    if act not in known:
        raise BackendError(f"{op}: act must be one of {', '.join(known)}, not {act!r}")


def check_tensors(
    op: str,
    x: Tensor,
    names: Sequence[str],
    vectors: Sequence[Tensor],
    others: Sequence[Tensor | None],
    channel_dim: int,
) -> None:
    """`vectors`: one number a channel, called `names`; `others`: tensors that must look like x."""
    if channel_dim not in (1, -1):
        raise BackendError(f"{op}: channel_dim must be 1 or -1, not {channel_dim}")
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) < 2:
        raise BackendError(f"{op}: x must have samples and channels, not the shape {tuple(shape)}")
    if not dtype.is_floating_point:
        raise BackendError(f"{op}: x must be float32, bfloat16 or float16, not {dtype}")
    wanted = torch.float32 if dtype in _LOW_PRECISION else dtype
    channels = shape[channel_dim]
    for name, vector in zip(names, vectors, strict=True):
        if vector.shape != (channels,) or vector.dtype != wanted or vector.device != device:
            raise BackendError(
                f"{op}: {name} must be {wanted} of shape ({channels},) on {device}, to go with x of shape "
                f"{tuple(shape)}; it is {vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
            )
    for other in others:
        if other is not None and (other.shape != shape or other.dtype != dtype or other.device != device):
            raise BackendError(
                f"{op}: residual, gradient and output must be like x, {dtype} of shape {tuple(shape)} on "
                f"{device}; one is {other.dtype} of shape {tuple(other.shape)} on {other.device}"
            )
