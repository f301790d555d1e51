"""masked_batch_norm in Triton, of the kernels of masked_affine and what is in here: the statistics, and grad_x.

Memory is a matrix as in triton_masked_affine.py. Statistics come from parts: each leaves, for each of its channels, a
number k within the data, the sum of x - k, and that of its square, which are put together in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnp_fast.ops import triton_masked_affine as affine
from mnp_fast.ops.layout import Layout
from mnp_fast.ops.triton_common import CHUNK_TILES, MAX_CHANNELS, MAX_POSITIONS, OPTIONS, device_of, tile_sizes

# Parts and channels that a program adds up at a time.
FINISH_PARTS = 32
FINISH_CHANNELS = 32


@triton.jit
def sums_planes_kernel(
    x: tl.tensor,
    part_k: tl.tensor,
    part_sum: tl.tensor,
    part_square: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = row < rows
    col = tl.arange(0, BLOCK_COLS)
    inside = here[:, None] & (col < cols)[None, :]
    first = tl.load(x + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    k = tl.sum(first, 1) / tl.minimum(cols, BLOCK_COLS).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    square = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in range(TILES):
        col = tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        inside = here[:, None] & (col < cols)[None, :]
        value = tl.load(x + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, value - k[:, None], 0.0)
        total += difference
        square += difference * difference
    tl.store(part_k + row, k, mask=here)
    tl.store(part_sum + row, tl.sum(total, 1), mask=here)
    tl.store(part_square + row, tl.sum(square, 1), mask=here)


@triton.jit
def sums_columns_kernel(
    x: tl.tensor,
    part_k: tl.tensor,
    part_sum: tl.tensor,
    part_square: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """A part is TILES * BLOCK_ROWS rows, and leaves `channels` numbers of each kind."""
    part = tl.program_id(0).to(tl.int64)
    begin = part * (TILES * BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    here = col < channels
    row = begin + tl.arange(0, BLOCK_ROWS)
    inside = (row < rows)[:, None] & here[None, :]
    first = tl.load(x + row[:, None] * channels + col[None, :], mask=inside, other=0.0).to(tl.float32)
    k = tl.sum(first, 0) / tl.minimum(rows - begin, BLOCK_ROWS).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    square = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in range(TILES):
        row = begin + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & here[None, :]
        value = tl.load(x + row[:, None] * channels + col[None, :], mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, value - k[None, :], 0.0)
        total += difference
        square += difference * difference
    out = part * channels + col
    tl.store(part_k + out, k, mask=here)
    tl.store(part_sum + out, tl.sum(total, 0), mask=here)
    tl.store(part_square + out, tl.sum(square, 0), mask=here)


@triton.jit
def finish_kernel(
    part_k: tl.tensor,
    part_sum: tl.tensor,
    part_square: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    scale: tl.tensor,
    parts: tl.tensor,
    part_rows: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    values: tl.tensor,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> None:
    """A part has `part_rows` values of a channel, the last one what is left of `rows`; `values` is all of them."""
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    here = col < channels
    total = tl.zeros((BLOCK_PARTS, BLOCK_COLS), tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        inside = (part < parts)[:, None] & here[None, :]
        offset = part.to(tl.int64)[:, None] * channels + col[None, :]
        count = tl.minimum(rows - part.to(tl.int64) * part_rows, part_rows).to(tl.float64)
        k = tl.load(part_k + offset, mask=inside, other=0.0).to(tl.float64)
        total += count[:, None] * k + tl.load(part_sum + offset, mask=inside, other=0.0).to(tl.float64)
    average = tl.sum(total, 0) / values.to(tl.float64)
    total = tl.zeros((BLOCK_PARTS, BLOCK_COLS), tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        inside = (part < parts)[:, None] & here[None, :]
        offset = part.to(tl.int64)[:, None] * channels + col[None, :]
        count = tl.minimum(rows - part.to(tl.int64) * part_rows, part_rows).to(tl.float64)
        # The sum of (x - mean)^2 from those of x - k and (x - k)^2.
        apart = tl.load(part_k + offset, mask=inside, other=0.0).to(tl.float64) - average[None, :]
        moved = tl.load(part_sum + offset, mask=inside, other=0.0).to(tl.float64)
        square = tl.load(part_square + offset, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, square + apart * (2.0 * moved + count[:, None] * apart), 0.0)
    variance = tl.sum(total, 0) / values.to(tl.float64)
    # Written so that NaN stays NaN.
    variance = tl.where(variance < 0.0, 0.0, variance)
    reciprocal = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    tl.store(mean + col, average.to(tl.float32), mask=here)
    tl.store(rstd + col, reciprocal, mask=here)
    tl.store(scale + col, tl.load(weight + col, mask=here, other=0.0) * reciprocal, mask=here)


@triton.jit
def grad_x_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    grad_x: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    center: tl.tensor,
    shift: tl.tensor,
    slope: tl.tensor,
    offset: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    channels: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    HAS_Y: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> None:
    """grad_x = a·g' + slope·(x - center) + offset, with a = mask·scale and g' the gradient behind the activation."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    if CHANNELS_LAST:
        here = col < cols
        a, b, mean = affine.coefficients(mask, scale, center, shift, col, here)
        p = tl.load(slope + col, mask=here, other=0.0)[None, :]
        q = tl.load(offset + col, mask=here, other=0.0)[None, :]
        a = a[None, :]
        b = b[None, :]
        mean = mean[None, :]
    else:
        here = row < rows
        a, b, mean = affine.coefficients(mask, scale, center, shift, row % channels, here)
        p = tl.load(slope + row % channels, mask=here, other=0.0)[:, None]
        q = tl.load(offset + row % channels, mask=here, other=0.0)[:, None]
        a = a[:, None]
        b = b[:, None]
        mean = mean[:, None]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        sign = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) if HAS_Y else a * value + b
        g = tl.where(sign <= 0.0, 0.0, g)
    out = a * g + (p * (value - mean) + q)
    tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    layout: Layout,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, s, channels_last = layout
    mean, rstd, scale = (torch.empty_like(mask) for _ in range(3))
    with device_of(x):
        if channels_last:
            block_rows, block_cols = tile_sizes(c, MAX_CHANNELS)
            part_rows, rows = block_rows * CHUNK_TILES, n * s
            parts = triton.cdiv(rows, part_rows)
            partial = mask.new_empty((3, parts, c)).unbind()
            sums_columns_kernel[(parts, triton.cdiv(c, block_cols))](
                x, *partial, rows, c,
                BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, TILES=CHUNK_TILES, **OPTIONS,
            )  # fmt: skip
        else:
            block_rows, block_cols = tile_sizes(s, MAX_POSITIONS)
            parts, part_rows, rows = n, s, n * s
            partial = mask.new_empty((3, n, c)).unbind()
            sums_planes_kernel[(triton.cdiv(n * c, block_rows),)](
                x, *partial, n * c, s,
                BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, TILES=triton.cdiv(s, block_cols), **OPTIONS,
            )  # fmt: skip
        finish_kernel[(triton.cdiv(c, FINISH_CHANNELS),)](
            *partial, weight, eps, mean, rstd, scale, parts, part_rows, rows, c, n * s,
            BLOCK_PARTS=FINISH_PARTS, BLOCK_COLS=FINISH_CHANNELS, **OPTIONS,
        )  # fmt: skip
    return affine.forward(x, mask, scale, mean, bias, residual, layout, act), mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    layout: Layout,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, s, channels_last = layout
    scale = weight * rstd
    grad_x, grad_residual, sum_g, sum_gx = affine.backward(
        grad, x, y, mask, scale, mean, bias, layout, act, False, need_grad_residual
    )
    sum_gx *= rstd
    if not need_grad_x:
        return grad_x, grad_residual, sum_g, sum_gx
    grad_x = torch.empty_like(x)
    a = mask * scale
    slope = -a * rstd * sum_gx.sum(0) / (n * s)
    offset = -a * sum_g.sum(0) / (n * s)
    rows, cols = (n * s, c) if channels_last else (n * c, s)
    block_rows, block_cols = tile_sizes(cols, MAX_CHANNELS if channels_last else MAX_POSITIONS)
    with device_of(x):
        grad_x_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(cols, block_cols))](
            # The gradient behind the activation is read where it has been written, and made again where it has not.
            grad_residual if need_grad_residual else grad,
            x,
            x if y is None else y,
            grad_x,
            mask,
            scale,
            mean,
            bias,
            slope,
            offset,
            rows,
            cols,
            c,
            CHANNELS_LAST=channels_last,
            RELU=act == "relu" and not need_grad_residual,
            HAS_Y=y is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            **OPTIONS,
        )
    return grad_x, grad_residual, sum_g, sum_gx
