"""A rewritten trace as a function of pictures, which are shared out over the cores where they do not meet."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from mnp_fast import workers
from mnp_fast.ops import samples
from mnp_fast.ops.differentiable import differentiable_once


def products_in(dtype: torch.dtype | None, device: str) -> AbstractContextManager[Any]:
    """Autocast to ``dtype``; with None whatever the caller has set."""
    # Without its cache, which inside a caller's autocast would give the first cast of weights that have changed since.
    return nullcontext() if dtype is None else torch.autocast(device, dtype, cache_enabled=False)


class Program:
    """A trace with the weights of a model, as a function of images.

    module: what runs; views.of: the masks of the sites, in the thread that runs. independent: no picture's logits
    depend on another picture, and any number of them from two on can be given.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        views: threading.local,
        sizes: list[int],
        mask: Tensor | None,
        device: str,
        dtype: torch.dtype | None,
        independent: bool,
    ) -> None:
        self.module, self.views, self.sizes, self.mask = module, views, sizes, mask
        self.device, self.dtype, self.independent = device, dtype, independent

    def __call__(self, images: Tensor) -> Tensor:
        parts = self.parts(images)
        if parts < 2 or self.mask is None:
            return self.run(images, self.mask)
        if torch.is_grad_enabled() and (self.mask.requires_grad or images.requires_grad):
            logits: Tensor = _Apart.apply(self, parts, images, self.mask)
            return logits
        chunks = images.tensor_split(parts)
        return torch.cat(workers.side_by_side([partial(self.run, chunk, self.mask) for chunk in chunks]))

    def parts(self, images: Tensor) -> int:
        """How many chunks of these images run side by side. A trace needs two pictures."""
        # With weight gradients it costs more than it gives: ResNet-50, batch 8, 820 ms a step against 470 ms.
        apart = self.independent and self.device == "cpu" and self.mask is not None
        return min(workers.threads(), len(images) // 2) if apart else 1

    def run(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of the images in this thread alone."""
        if mask is not None:
            # One split a forward: its backward is one cat, and the gradient of the mask is one tensor.
            self.views.of = samples.split(mask, self.sizes)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with products_in(self.dtype, self.device):
            logits: Tensor = self.module(images)
        return logits


class _Apart(torch.autograd.Function):
    """Forward and backward of several chunks of pictures side by side; gradients of the pictures and of the mask."""

    @staticmethod
    def forward(ctx: Any, whole: Program, parts: int, images: Tensor, mask: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]

        def piece(chunk: Tensor) -> tuple[Tensor, list[Tensor]]:
            with torch.enable_grad():
                own = [part.detach().requires_grad_(want) for part, want in zip((chunk, mask), wanted, strict=True)]
                logits = whole.run(*own)
                return logits, [part for part in own if part.requires_grad]

        ctx.parts = workers.side_by_side([partial(piece, chunk) for chunk in images.tensor_split(parts)])
        return torch.cat([logits.detach() for logits, _ in ctx.parts])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        parts, ctx.parts = ctx.parts, None

        def piece(part: tuple[Tensor, list[Tensor]], grad: Tensor) -> list[Tensor]:
            logits, own = part
            return list(torch.autograd.grad(logits, own, grad))

        grads = grad.split([len(logits) for logits, _ in parts])
        found = workers.side_by_side([partial(piece, *both) for both in zip(parts, grads, strict=True)])
        of_images, of_mask = ctx.needs_input_grad[2:]
        total: Tensor | None = None
        if of_mask:
            total, *others = (each[-1] for each in found)
            for other in others:
                total += other
        return None, None, torch.cat([each[0] for each in found]) if of_images else None, total
