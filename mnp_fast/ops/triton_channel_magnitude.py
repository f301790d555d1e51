"""channel_magnitude in Triton. Imported only where Triton is.

One launch for all tensors, told of them by a table on the device. A program takes one long row or several short ones.
Numbers are widened to float32 as they are loaded, and sums are added in an order that depends on the sizes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnp_fast.ops.triton_common import OPTIONS, device_of

TILE = 2048
# Rows no longer than this are taken several at a time.
SHORT = 512
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def tile_rows(
    data: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    begin: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> None:
    """Rows [begin, begin + BLOCK_ROWS) of one tensor, whose first row is row `first` of all."""
    row = begin + tl.arange(0, BLOCK_ROWS)
    here = row < rows
    l1 = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    l2 = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, length, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        inside = here[:, None] & (col < length)[None, :]
        x = tl.load(data + row[:, None] * length + col[None, :], mask=inside, other=0.0).to(tl.float32)
        size = tl.abs(x)
        l1 += size
        l2 += x * x
        largest = tl.maximum(largest, size)
    sum1 = tl.sum(l1, 1)
    # The L1 norm is NaN just where a number is; a largest number does not remember it.
    top = tl.where(sum1 == sum1, tl.max(largest, 1), sum1)
    tl.store(out + first + row, sum1, mask=here)
    tl.store(out + total + first + row, tl.sqrt(tl.sum(l2, 1)), mask=here)
    tl.store(out + 2 * total + first + row, top, mask=here)


@triton.jit
def magnitude_kernel(
    table: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    tensors: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK_TENSORS: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    # Columns of the table: address, length of a row, rows, first row, first program. The tensor of this program is the
    # last whose first program is not behind it.
    program = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_TENSORS)
    starts = tl.load(table + 5 * k + 4, mask=k < tensors, other=9223372036854775807)
    entry = table + 5 * (tl.sum((starts <= program).to(tl.int32), 0) - 1)
    address = tl.load(entry)
    length = tl.load(entry + 1)
    rows = tl.load(entry + 2)
    first = tl.load(entry + 3)
    mine = program - tl.load(entry + 4)
    data = address.to(tl.pointer_type(DTYPE))
    # Only where it is known that addresses are multiples of 16 does the compiler read 16 bytes at once.
    if (address % 16 == 0) & (length % 16 == 0):
        # Values of their own: a hint stays with its value in the other branch too.
        data16 = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
        length16 = length // 16 * 16
        if length <= SHORT:
            tile_rows(
                data16, out, total, mine * (TILE // SHORT), first, rows, length16, TILE // SHORT, SHORT
            )  # fmt: skip
        else:
            tile_rows(data16, out, total, mine, first, rows, length16, 1, TILE)
    elif length <= SHORT:
        tile_rows(data, out, total, mine * (TILE // SHORT), first, rows, length, TILE // SHORT, SHORT)
    else:
        tile_rows(data, out, total, mine, first, rows, length, 1, TILE)


def forward(weights: list[Tensor]) -> Tensor:
    table: list[list[int]] = []
    total = programs = 0
    for weight in weights:
        rows = weight.shape[0]
        length = weight.numel() // rows if rows else 0
        table.append([weight.data_ptr(), length, rows, total, programs])
        total += rows
        programs += triton.cdiv(rows, TILE // SHORT if length <= SHORT else 1)
    out = weights[0].new_empty((3, total), dtype=torch.float32)
    if programs == 0:
        return out
    constants: dict[str, Any] = {"DTYPE": _TYPES[weights[0].dtype], "SHORT": SHORT, "TILE": TILE}
    with device_of(out):
        magnitude_kernel[(programs,)](
            torch.tensor(table, device=out.device), out, total, len(weights),
            BLOCK_TENSORS=triton.next_power_of_2(len(weights)), **constants, **OPTIONS,
        )  # fmt: skip
    return out
