"""Convolutions, each with its affine, mask, residual and activation, that follow each other, as one function.

A network of convolutions is one region from its first to its last: one call of autograd for all of them, gradients
that nobody else holds are overwritten in place, and a convolution adds its gradient onto what its input has already got
from a residual connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnp_fast.frozen import FrozenConv2d
from mnp_fast.graph.layers import Affine
from mnp_fast.ops import op_masked_affine
from mnp_fast.ops.differentiable import differentiable_once
from mnp_fast.ops.samples import sink_of


@dataclass(frozen=True)
class Link:
    """A convolution and the affine behind it. x, residual: the numbers of the values that go in."""

    conv: FrozenConv2d
    affine: Affine
    x: int
    residual: int | None


class Region(nn.Module):
    """The links one after the other. Values are numbered: first the ``inputs`` of the region, then one for each link.

    outputs: the numbers of the values that are used outside; one of them is given as a tensor, several as a tuple.
    """

    def __init__(self, links: Sequence[Link], inputs: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.links, self.inputs, self.outputs = list(links), inputs, list(outputs)
        self.dtype = self.links[0].conv.dtype
        last = dict.fromkeys(range(inputs + len(self.links)), -1)
        for i, link in enumerate(self.links):
            last[link.x] = i
            if link.residual is not None:
                last[link.residual] = i
        # Values that nobody asks for after link i.
        self.done = [[v for v, when in last.items() if when == i and v not in self.outputs] for i in range(len(links))]

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = [x.to(self.dtype).contiguous(memory_format=torch.channels_last) for x in inputs]
        masks = [link.affine.mask() for link in self.links]
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *masks))
        found = _Run.apply(self, *given, *masks) if tracked else self.run(given, masks, None)
        return found[0] if len(self.outputs) == 1 else found

    def run(self, given: Sequence[Tensor], masks: Sequence[Tensor], kept: list[Any] | None) -> tuple[Tensor, ...]:
        """The outputs; what the backward needs of each link goes into ``kept``."""
        values: list[Any] = list(given)
        for link, mask, done in zip(self.links, masks, self.done, strict=True):
            x, act = values[link.x], link.affine.act
            residual = None if link.residual is None else values[link.residual]
            z = link.conv.run(x)
            if kept is None:
                y = op_masked_affine.run(z, mask, *link.affine.vectors, residual, 1, act)
            else:
                y, sign = op_masked_affine.run_keeping_sign(z, mask, *link.affine.vectors, residual, act)
                kept.append((x.shape, z, sign))
            values.append(y)
            for number in done:
                values[number] = None
        return tuple(values[number] for number in self.outputs)

    def run_backward(
        self,
        grads: Sequence[Tensor | None],
        masks: Sequence[Tensor],
        sinks: Sequence[Any],
        kept: list[Any],
        needed: Sequence[bool],
        keep: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of the inputs and of the masks; ``needed`` says of which. ``kept`` is emptied unless ``keep``."""
        values: list[Tensor | None] = [None] * (self.inputs + len(self.links))
        # Gradients from outside may be somebody else's too; those from inside are written over.
        owned = [False] * len(values)
        for number, grad in zip(self.outputs, grads, strict=True):
            values[number] = grad
        needs = list(needed[: self.inputs])
        for link, of_mask in zip(self.links, needed[self.inputs :], strict=True):
            needs.append(of_mask or needs[link.x] or (link.residual is not None and needs[link.residual]))
        sums: dict[int, Tensor] = {}
        for i in reversed(range(len(self.links))):
            link, mask, number = self.links[i], masks[i], self.inputs + i
            shape, z, sign = kept[i] if keep else kept.pop()
            grad, values[number] = values[number], None
            if grad is None or not needs[number]:
                continue
            scale, act = link.affine.vectors[0], link.affine.act
            added = link.residual if link.residual is not None and needs[link.residual] else None
            through = added is not None and act == "relu"
            # Without an activation the residual's gradient is ``grad`` as it is.
            over = owned[number] and (through or added is None)
            grad_z, grad_residual, _, sum_gx = op_masked_affine.run_backward_(
                grad, z, sign, mask, *link.affine.vectors, act, over or needs[link.x], through, over
            )
            rows = z.shape
            del z, sign
            if sinks[i] is not None:
                sinks[i](rows, scale * sum_gx)
            sums[i] = sum_gx
            if added is not None:
                _add(values, owned, added, grad_residual if through else grad, through or owned[number])
            if needs[link.x]:
                before = values[link.x]
                if before is not None and owned[link.x]:
                    values[link.x] = link.conv.back(grad_z, shape, before)
                else:
                    _add(values, owned, link.x, link.conv.back(grad_z, shape), True)
        return values[: self.inputs], self._of_masks(sums)

    def _of_masks(self, sums: dict[int, Tensor]) -> list[Tensor | None]:
        """Gradients of the masks from the sums (N, C) of each link; None where there are none."""
        found: list[Tensor | None] = [None] * len(self.links)
        if sums:
            # All at once: on a GPU two small kernels a link were 12 % of a step of ResNet-18 on 32x32 pictures.
            scales = torch.cat([self.links[i].affine.vectors[0] for i in sums])
            parts = (scales * torch.cat(list(sums.values()), 1).sum(0)).split([part.shape[1] for part in sums.values()])
            for i, part in zip(sums, parts, strict=True):
                found[i] = part
        return found


def _add(values: list[Tensor | None], owned: list[bool], number: int, grad: Tensor, ours: bool) -> None:
    """Add to the gradient of a value; ``ours``: nobody else holds ``grad``."""
    before = values[number]
    if before is None:
        values[number], owned[number] = grad, ours
    elif owned[number]:
        before += grad
    else:
        values[number], owned[number] = before + grad, True


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: Region, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, masks = tensors[: region.inputs], tensors[region.inputs :]
        kept: list[Any] = []
        outputs = region.run(given, masks, kept)
        # An output that the context held itself would hold its own graph, for ever. Its place says which it is.
        signs = {id(sign) for _, _, sign in kept}
        saved = [y for y in outputs if id(y) in signs]
        places = {id(y): i for i, y in enumerate(saved)}
        ctx.kept = [(shape, z, places.get(id(sign), sign)) for shape, z, sign in kept]
        ctx.region, ctx.sinks = region, [sink_of(mask) for mask in masks]
        ctx.save_for_backward(*masks, *saved)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        region, saved = ctx.region, ctx.saved_tensors
        masks, signs = saved[: len(region.links)], saved[len(region.links) :]
        keep: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        kept = [(shape, z, signs[sign] if isinstance(sign, int) else sign) for shape, z, sign in ctx.kept]
        if not keep:
            ctx.kept = None
        found, of_masks = region.run_backward(grads, masks, ctx.sinks, kept, ctx.needs_input_grad[1:], keep)
        return None, *found, *of_masks
