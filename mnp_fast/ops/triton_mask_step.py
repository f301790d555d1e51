"""mask_step in Triton. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mnp_fast.ops.triton_common import device_of

BLOCK = 1024
# Without fusion every product and sum is rounded, as in the other backends: the same bits everywhere.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def step_kernel(
    mask: tl.tensor,
    momentum: tl.tensor,
    grad: tl.tensor,
    magnitude: tl.tensor,
    neurons: tl.tensor,
    rate: tl.tensor,
    decay: tl.tensor,
    penalty: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < neurons
    pull = penalty * tl.load(magnitude + i, mask=inside)
    new = decay * tl.load(momentum + i, mask=inside) + tl.load(grad + i, mask=inside) + pull
    tl.store(momentum + i, new, mask=inside)
    moved = tl.load(mask + i, mask=inside) - rate * new
    # Written so that NaN stays NaN.
    moved = tl.where(moved < 0.0, 0.0, moved)
    tl.store(mask + i, tl.where(moved > 1.0, 1.0, moved), mask=inside)


def step(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, rate: float, decay: float, penalty: float
) -> None:
    neurons = mask.numel()
    if neurons == 0:
        return
    with device_of(mask):
        step_kernel[(triton.cdiv(neurons, BLOCK),)](
            mask, momentum, grad, magnitude, neurons, rate, decay, penalty, BLOCK=BLOCK, **OPTIONS
        )
