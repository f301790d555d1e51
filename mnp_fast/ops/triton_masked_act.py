"""masked_act in Triton. Imported only where Triton is; registry and layout are as for the other backends.

Tiles, widening and the order of sums are those of triton_masked_affine.py; the formulas of the activations are those
of csrc/act.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnp_fast.ops.layout import Layout
from mnp_fast.ops.triton_common import CHUNK_TILES, MAX_CHANNELS, MAX_POSITIONS, OPTIONS, device_of, tile_sizes


@triton.jit
def activation(x: tl.tensor, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """act(x) and its derivative; NaN stays NaN."""
    # Written so that NaN stays NaN.
    positive = tl.where(x < 0.0, 0.0, x)
    if ACT == "relu":
        act = positive
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        # Beyond 80, and 9 where the cube counts, a·Q(a) and a·D(a) are gone.
        a = tl.abs(x)
        if ACT == "gelu":
            a = tl.where(a > 9.0, 9.0, a)
            q = 0.5 - 0.5 * tl.erf(a * 0.7071067811865476)
            d = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        else:
            if ACT == "gelu_tanh":
                a = tl.where(a > 9.0, 9.0, a)
                g = 1.5957691216057308 * (a + 0.044715 * a * a * a)
                steepness = 1.5957691216057308 * (1.0 + 0.134145 * a * a)
            elif ACT == "silu":
                a = tl.where(a > 80.0, 80.0, a)
                g = a
                steepness = 1.0
            else:
                a = tl.where(a > 48.0, 48.0, a)
                g = 1.702 * a
                steepness = 1.702
            e = tl.exp(-g)
            q = e / (1.0 + e)
            d = q * (1.0 - q) * steepness
        act = positive - a * q
        half = 0.5 + a * d - q
        slope = 0.5 + tl.where(x < 0.0, -half, half)
    return act, slope


@triton.jit
def forward_kernel(
    x: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    channels: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    offset = row[:, None] * cols + col[None, :]
    if CHANNELS_LAST:
        m = tl.load(mask + col, mask=col < cols, other=0.0)[None, :]
    else:
        m = tl.load(mask + row % channels, mask=row < rows, other=0.0)[:, None]
    act, _ = activation(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32), ACT)
    tl.store(y + offset, (m * act).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_tile(
    grad: tl.tensor,
    x: tl.tensor,
    grad_x: tl.tensor,
    offset: tl.tensor,
    inside: tl.tensor,
    m: tl.tensor,
    ACT: tl.constexpr,
    NEED_X: tl.constexpr,
) -> tl.tensor:
    """Stores the gradient of one tile; returns what it adds to the sums, zero outside."""
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    act, slope = activation(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32), ACT)
    if NEED_X:
        # Chosen, not multiplied: behind a closed relu infinity and NaN are zero too, as torch has it.
        through = tl.where(slope == 0.0, 0.0, g) if ACT == "relu" else slope * g
        tl.store(grad_x + offset, (m * through).to(grad_x.dtype.element_ty), mask=inside)
    return g * act


@triton.jit
def backward_planes_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    grad_x: tl.tensor,
    mask: tl.tensor,
    sum_gact: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    channels: tl.tensor,
    ACT: tl.constexpr,
    NEED_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = row < rows
    m = tl.load(mask + row % channels, mask=here, other=0.0)[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in range(TILES):
        col = tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        inside = here[:, None] & (col < cols)[None, :]
        total += backward_tile(grad, x, grad_x, row[:, None] * cols + col[None, :], inside, m, ACT, NEED_X)
    tl.store(sum_gact + row, tl.sum(total, 1), mask=here)


@triton.jit
def backward_columns_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    grad_x: tl.tensor,
    mask: tl.tensor,
    sum_gact: tl.tensor,
    positions: tl.tensor,
    chunks: tl.tensor,
    channels: tl.tensor,
    ACT: tl.constexpr,
    NEED_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    part = tl.program_id(0).to(tl.int64)
    sample = part // chunks
    first = (part % chunks) * (TILES * BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    here = col < channels
    m = tl.load(mask + col, mask=here, other=0.0)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in range(TILES):
        row = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < positions)[:, None] & here[None, :]
        offset = (sample * positions + row)[:, None] * channels + col[None, :]
        total += backward_tile(grad, x, grad_x, offset, inside, m, ACT, NEED_X)
    tl.store(sum_gact + part * channels + col, tl.sum(total, 0), mask=here)


def forward(x: Tensor, mask: Tensor, layout: Layout, act: str) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    n, c, s, channels_last = layout
    rows, cols = (n * s, c) if channels_last else (n * c, s)
    block_rows, block_cols = tile_sizes(cols, MAX_CHANNELS if channels_last else MAX_POSITIONS)
    with device_of(x):
        forward_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(cols, block_cols))](
            x, y, mask, rows, cols, c,
            CHANNELS_LAST=channels_last, ACT=act, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, **OPTIONS,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, mask: Tensor, layout: Layout, act: str, need_grad_x: bool
) -> tuple[Tensor, Tensor]:
    n, c, s, channels_last = layout
    grad_x = torch.empty_like(x) if need_grad_x else x.new_empty(0)
    if x.numel() == 0:
        return grad_x, mask.new_zeros((n, c))
    flags = {"ACT": act, "NEED_X": need_grad_x}
    with device_of(x):
        if not channels_last:
            sum_gact = mask.new_empty((n, c))
            block_rows, block_cols = tile_sizes(s, MAX_POSITIONS)
            backward_planes_kernel[(triton.cdiv(n * c, block_rows),)](
                grad, x, grad_x, mask, sum_gact, n * c, s, c,
                **flags, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, TILES=triton.cdiv(s, block_cols), **OPTIONS,
            )  # fmt: skip
            return grad_x, sum_gact
        block_rows, block_cols = tile_sizes(c, MAX_CHANNELS)
        chunks = triton.cdiv(s, block_rows * CHUNK_TILES)
        sum_gact = mask.new_empty((n, chunks, c))
        backward_columns_kernel[(n * chunks, triton.cdiv(c, block_cols))](
            grad, x, grad_x, mask, sum_gact, s, chunks, c,
            **flags, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, TILES=CHUNK_TILES, **OPTIONS,
        )  # fmt: skip
    return grad_x, sum_gact.view(n, c) if chunks == 1 else sum_gact.sum(1)
