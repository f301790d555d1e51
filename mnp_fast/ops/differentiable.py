"""Backwards that cannot be differentiated again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TWICE = b"mnp_fast's ops have no second derivative: use plain torch where a gradient is to be differentiated"


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd function, without a graph of its own; differentiating what it gives is an error.

    torch's `once_differentiable` says so only where the incoming gradient is differentiated too. Where that one is a
    constant, as behind a sum, gradients through what the forward has saved were silently zero.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        every = found if isinstance(found, tuple) else (found,)
        error = torch._C._functions.DelayedError(_TWICE, len(every))
        return error(*(g.detach().requires_grad_() if isinstance(g, Tensor) else g for g in every))

    return once
