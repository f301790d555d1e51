"""What a capture gives: the trace of a model, without its weights, and where its sites are in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Place:
    """A node where a site's parameter is used. ``fused``: as the op that the kind of the site expects."""

    node: str
    argument: int
    fused: bool


@dataclass(frozen=True)
class Captured:
    """A traced model, or the reason that there is none.

    graph: the trace, with a placeholder for every weight; names: placeholder to the name of parameter or buffer;
    constants: placeholder to tensor. batch: None where any number of pictures from two on can be given. norms: whether
    statistics of the batch can be had by it. apart: no picture's logits depend on another picture, whose statistics a
    batch norm may still bring in.
    """

    reason: str | None
    shape: tuple[int, ...] = ()
    batch: int | None = None
    graph: fx.Graph | None = None
    names: dict[str, str] | None = None
    constants: dict[str, Tensor] | None = None
    places: tuple[tuple[Place, ...], ...] = ()
    norms: bool = True
    apart: bool = False

    def takes(self, images: Any) -> bool:
        """Whether the trace stands for a forward of these images."""
        return (
            self.graph is not None
            and isinstance(images, Tensor)
            and images.dtype == torch.float32
            and tuple(images.shape[1:]) == self.shape
            and (len(images) > 1 if self.batch is None else len(images) == self.batch)
        )
