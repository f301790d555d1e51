"""The short way into an op: no dispatcher for plain tensors in eager mode.

torch.library's wrappers cost 50 us a forward and backward of an op written in Python, more than the kernel itself on a
small layer. Where something must see the op itself (compile, export, fake tensors, functorch, torch function modes,
tensor subclasses), it is called through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mnp_fast.errors import BackendError
from mnp_fast.ops.differentiable import differentiable_once

_PLAIN = (Tensor, nn.Parameter)


def short_way(
    dispatched: Callable[..., Any],
    forward: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """A function like the op ``dispatched``; the others as `torch.library.register_autograd` takes them."""

    def run_and_save(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        save(ctx, args, output)
        return output

    # Not setup_context: torch then looks at the signature of forward in every call, which takes 90 us.
    function = type(
        forward.__module__.rpartition(".")[2],
        (torch.autograd.Function,),
        {"forward": staticmethod(run_and_save), "backward": staticmethod(differentiable_once(backward))},
    )

    def call(*args: Any) -> Any:
        # Neither the dispatcher nor a plain call would say a word, and the tangent would be lost.
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise BackendError("mnp_fast's ops have no forward-mode derivative (jvp): use backward() or torch.func.vjp")
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            return dispatched(*args)
        tracked = False
        for value in args:
            if isinstance(value, Tensor):
                if type(value) not in _PLAIN:
                    return dispatched(*args)
                tracked = tracked or value.requires_grad
        if tracked and torch.is_grad_enabled():
            return function.apply(*args)  # type: ignore[attr-defined]
        return forward(*args)

    return call


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
