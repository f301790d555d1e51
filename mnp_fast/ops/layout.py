"""How a tensor lies in memory, as the kernels see it: samples x channels x positions, channels outside or inside."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Sizes of a dense tensor: (n, c, s) in memory order, or (n, s, c) where `channels_last`."""

    n: int
    c: int
    s: int
    channels_last: bool


def dense(x: Tensor, channel_dim: int) -> tuple[Tensor, Layout]:
    """`x`, copied only where its memory is neither (n, c, s) nor (n, s, c), and its layout.

    Works on fake tensors: real and fake kernels must agree on the strides of what they return.
    """
    shape = x.shape
    n = shape[0]
    if channel_dim == -1:
        c = shape[-1]
        s = 1
        for size in shape[1:-1]:
            s *= size
        return x.contiguous(), Layout(n, c, s, True)
    c = shape[1]
    s = 1
    for size in shape[2:]:
        s *= size
    if x.is_contiguous():
        # With one position both orders are the same memory, and rows of c are longer than rows of 1.
        return x, Layout(n, c, s, s == 1)
    if _is_channels_last(x):
        return x, Layout(n, c, s, True)
    return x.contiguous(), Layout(n, c, s, s == 1)


def dense_rows(x: Tensor) -> Tensor:
    """`x`, copied only where its rows (dim 0) do not lie one after the other, each without holes, in memory."""
    return x if _is_channels_last(x) else x.contiguous()


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` with the memory order of the dense tensor `x` of the same shape, copied only where it differs."""
    if tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def _is_channels_last(x: Tensor) -> bool:
    memory_format = _CHANNELS_LAST.get(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
