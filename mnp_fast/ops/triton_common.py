"""What the Triton launches of every op share: options, sizes of tiles, the device."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

TILE = 2048
# The wide side of a tile: a whole plane of most layers, or as many channels as a warp reads at once.
MAX_POSITIONS = 1024
MAX_CHANNELS = 128
# Tiles of a chunk of rows in the backward with the channels inside.
CHUNK_TILES = 16
# Explicit, as the default of the fusion differs between versions of Triton.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def tile_sizes(cols: int, widest: int) -> tuple[int, int]:
    """(rows, columns) of a tile for rows of `cols` numbers."""
    columns = min(triton.next_power_of_2(cols), widest)
    return TILE // columns, columns


def device_of(x: Tensor) -> Any:
    # Triton launches on the current device. For a tensor on the CPU, in the interpreter, this does nothing.
    return torch.cuda.device(x.device if x.is_cuda else -1)
