"""The gradient of a mask sample by sample: the backward of an op has it before it sums over the samples.

A mask that is watched hands every such backward to its sink. The sink lives on the tensor object, so that ops are
called as ever; what is computed from a mask is watched only where these functions compute it. An op that runs through
the dispatcher (compile, export, functorch) hands on nothing, and neither does `masked_batch_norm`, whose samples depend
on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Sink = Callable[[torch.Size, Tensor], None]
"""Takes the shape of x and the gradient of the mask for every entry of its dimension 0, (x.shape[0], C)."""


def watch(mask: Tensor, sink: Callable[..., None] | None) -> Tensor:
    """``mask`` itself, which hands its gradients to ``sink`` from now on; None: to nobody."""
    mask.__dict__["_sink"] = sink
    return mask


def sink_of(mask: Tensor) -> Any:
    return mask.__dict__.get("_sink")


def split(mask: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Views of the flat mask; its sink takes the number of the view first."""
    views = mask.split(sizes)
    sink = sink_of(mask)
    if sink is not None:
        for i, view in enumerate(views):
            watch(view, partial(sink, i))
    return views


def repeated(mask: Tensor, repeat: int) -> Tensor:
    """Every entry ``repeat`` times in a row, (C * repeat,)."""
    if repeat == 1:
        return mask
    columns = mask.repeat_interleave(repeat)
    sink: Sink | None = sink_of(mask)
    if sink is not None:
        watch(columns, lambda shape, rows: sink(shape, rows.unflatten(1, (-1, repeat)).sum(2)))
    return columns


def cast(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.dtype == dtype else watch(mask.to(dtype), sink_of(mask))
