"""3x3 convolutions in float32 with a frozen filter, by F(4x4, 3x3) of Lavin and Gray (arXiv 1509.09308), on a CPU.

36 multiplications where the plain sum takes 144: 1.6 to 2.6 times as fast as oneDNN's convolution on the layers of
ResNet-50 (docs/decisions.md). Errors are those of float32 with five times as many roundings: 1e-6 to 3e-6 of the result
in L2 against 2e-7 to 8e-7. NaN and infinities spread over the 4x4 results that
share a tile. Without autograd: `mnp_fast.frozen` has the gradient, which is such a convolution again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mnp_fast.ops import registry

_TILE, _PANEL = 4, 32  # as in csrc/cpu/winograd.h
_FEWEST_CHANNELS = 32  # at 16 it takes as long as oneDNN's
_FEWEST_TILES = 16  # filters are four times as large when transformed, and have to be read for each call
# At the points 0, 1, -1, 2, -2 and infinity.
_FILTER = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))
_DENOMINATOR = 24.0

Kernel = Callable[[Tensor, Tensor, int, Sequence[int]], Tensor]


def kernel(weight: Tensor) -> Kernel | None:
    """The function (x, transformed weight, out channels, padding) -> y for a filter like this, None where none is.

    weight: (out, in, 3, 3) float32. x: (N, in, H, W) channels_last, as y is.
    """
    if weight.dtype != torch.float32 or weight.shape[2:] != (3, 3) or min(weight.shape[:2]) < _FEWEST_CHANNELS:
        return None
    return registry.beside("masked_affine", "winograd", weight.device, weight.dtype)


def pays(shape: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether an x of this shape, (N, C, H, W), is worth it: tiles enough, and most of each inside of the result."""
    height, width = (shape[2 + i] + 2 * padding[i] - 2 for i in (0, 1))
    tiles = -(-height // _TILE) * -(-width // _TILE)
    return shape[0] * tiles >= _FEWEST_TILES and height * width >= 6 * tiles


def transformed(weight: Tensor) -> Tensor:
    """The filter at the 36 points, (36, panels, in, 32): panels of 32 output channels, zero beyond the last."""
    points = (torch.tensor(_FILTER, dtype=torch.float64) / _DENOMINATOR).to(weight)
    u = torch.einsum("pk,oikl->poil", points, weight)
    u = torch.einsum("ql,poil->pqio", points, u).flatten(0, 1)
    u = F.pad(u, (0, -u.shape[-1] % _PANEL))
    return u.unflatten(2, (-1, _PANEL)).transpose(1, 2).contiguous()
