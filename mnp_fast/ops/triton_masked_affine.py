"""masked_affine in Triton. Imported only where Triton is; registry and layout are as for the other backends.

Memory is a matrix: planes x positions with the channels outside, positions x channels with the channels inside. A
program takes a tile of it. Numbers are widened to float32 as they are loaded, and sums are added in an order that
depends on the sizes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnp_fast.ops.layout import Layout
from mnp_fast.ops.triton_common import CHUNK_TILES, MAX_CHANNELS, MAX_POSITIONS, OPTIONS, device_of, tile_sizes


@triton.jit
def coefficients(
    mask: tl.tensor, scale: tl.tensor, center: tl.tensor, shift: tl.tensor, c: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    mean = tl.load(center + c, mask=inside, other=0.0)
    a = tl.load(mask + c, mask=inside, other=0.0) * tl.load(scale + c, mask=inside, other=0.0)
    return a, tl.load(shift + c, mask=inside, other=0.0) - a * mean, mean


@triton.jit
def forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    center: tl.tensor,
    shift: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    channels: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    offset = row[:, None] * cols + col[None, :]
    if CHANNELS_LAST:
        a, b, _ = coefficients(mask, scale, center, shift, col, col < cols)
        a = a[None, :]
        b = b[None, :]
    else:
        a, b, _ = coefficients(mask, scale, center, shift, row % channels, row < rows)
        a = a[:, None]
        b = b[:, None]
    out = a * tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + b
    if HAS_RESIDUAL:
        out += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        # Written so that NaN stays NaN.
        out = tl.where(out < 0.0, 0.0, out)
    tl.store(y + offset, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_tile(
    grad: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    grad_x: tl.tensor,
    grad_residual: tl.tensor,
    offset: tl.tensor,
    inside: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    mean: tl.tensor,
    RELU: tl.constexpr,
    HAS_Y: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Stores the gradients of one tile; returns what it adds to the two sums, zero outside."""
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        sign = tl.load(y + offset, mask=inside, other=0.0).to(tl.float32) if HAS_Y else a * value + b
        g = tl.where(sign <= 0.0, 0.0, g)
    if NEED_X:
        tl.store(grad_x + offset, (a * g).to(grad_x.dtype.element_ty), mask=inside)
    if NEED_RESIDUAL:
        tl.store(grad_residual + offset, g.to(grad_residual.dtype.element_ty), mask=inside)
    return g, g * (value - mean)


@triton.jit
def backward_planes_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    grad_x: tl.tensor,
    grad_residual: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    center: tl.tensor,
    shift: tl.tensor,
    sum_g: tl.tensor,
    sum_gx: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    channels: tl.tensor,
    RELU: tl.constexpr,
    HAS_Y: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = row < rows
    a, b, mean = coefficients(mask, scale, center, shift, row % channels, here)
    total_g = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    total_gx = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in range(TILES):
        col = tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        inside = here[:, None] & (col < cols)[None, :]
        offset = row[:, None] * cols + col[None, :]
        g, gx = backward_tile(
            grad, x, y, grad_x, grad_residual, offset, inside, a[:, None], b[:, None], mean[:, None],
            RELU, HAS_Y, NEED_X, NEED_RESIDUAL,
        )  # fmt: skip
        total_g += g
        total_gx += gx
    tl.store(sum_g + row, tl.sum(total_g, 1), mask=here)
    tl.store(sum_gx + row, tl.sum(total_gx, 1), mask=here)


@triton.jit
def backward_columns_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    grad_x: tl.tensor,
    grad_residual: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    center: tl.tensor,
    shift: tl.tensor,
    sum_g: tl.tensor,
    sum_gx: tl.tensor,
    positions: tl.tensor,
    chunks: tl.tensor,
    channels: tl.tensor,
    RELU: tl.constexpr,
    HAS_Y: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    part = tl.program_id(0).to(tl.int64)
    sample = part // chunks
    first = (part % chunks) * (TILES * BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    here = col < channels
    a, b, mean = coefficients(mask, scale, center, shift, col, here)
    total_g = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    total_gx = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for tile in range(TILES):
        row = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < positions)[:, None] & here[None, :]
        offset = (sample * positions + row)[:, None] * channels + col[None, :]
        g, gx = backward_tile(
            grad, x, y, grad_x, grad_residual, offset, inside, a[None, :], b[None, :], mean[None, :],
            RELU, HAS_Y, NEED_X, NEED_RESIDUAL,
        )  # fmt: skip
        total_g += g
        total_gx += gx
    tl.store(sum_g + part * channels + col, tl.sum(total_g, 0), mask=here)
    tl.store(sum_gx + part * channels + col, tl.sum(total_gx, 0), mask=here)


def forward(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    layout: Layout,
    act: str,
) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    n, c, s, channels_last = layout
    rows, cols = (n * s, c) if channels_last else (n * c, s)
    block_rows, block_cols = tile_sizes(cols, MAX_CHANNELS if channels_last else MAX_POSITIONS)
    with device_of(x):
        forward_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(cols, block_cols))](
            x,
            x if residual is None else residual,
            y,
            mask,
            scale,
            center,
            shift,
            rows,
            cols,
            c,
            CHANNELS_LAST=channels_last,
            HAS_RESIDUAL=residual is not None,
            RELU=act == "relu",
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            **OPTIONS,
        )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    layout: Layout,
    act: str,
    need_grad_x: bool,
    need_grad_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, s, channels_last = layout
    grad_x = torch.empty_like(x) if need_grad_x else x.new_empty(0)
    grad_residual = torch.empty_like(x) if need_grad_residual else x.new_empty(0)
    if x.numel() == 0:
        return grad_x, grad_residual, mask.new_zeros((n, c)), mask.new_zeros((n, c))
    tensors = (grad, x, x if y is None else y, grad_x, grad_residual, mask, scale, center, shift)
    flags = {
        "RELU": act == "relu",
        "HAS_Y": y is not None,
        "NEED_X": need_grad_x,
        "NEED_RESIDUAL": need_grad_residual,
    }
    with device_of(x):
        if not channels_last:
            sum_g, sum_gx = mask.new_empty((n, c)), mask.new_empty((n, c))
            block_rows, block_cols = tile_sizes(s, MAX_POSITIONS)
            backward_planes_kernel[(triton.cdiv(n * c, block_rows),)](
                *tensors, sum_g, sum_gx, n * c, s, c,
                **flags, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, TILES=triton.cdiv(s, block_cols), **OPTIONS,
            )  # fmt: skip
            return grad_x, grad_residual, sum_g, sum_gx
        block_rows, block_cols = tile_sizes(c, MAX_CHANNELS)
        chunks = triton.cdiv(s, block_rows * CHUNK_TILES)
        sum_g, sum_gx = mask.new_empty((n, chunks, c)), mask.new_empty((n, chunks, c))
        backward_columns_kernel[(n * chunks, triton.cdiv(c, block_cols))](
            *tensors, sum_g, sum_gx, s, chunks, c,
            **flags, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, TILES=CHUNK_TILES, **OPTIONS,
        )  # fmt: skip
    if chunks == 1:
        return grad_x, grad_residual, sum_g.view(n, c), sum_gx.view(n, c)
    return grad_x, grad_residual, sum_g.sum(1), sum_gx.sum(1)
