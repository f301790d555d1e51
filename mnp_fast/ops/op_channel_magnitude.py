"""channel_magnitude: schema, argument checks and fake kernel. The kernels are in the backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnp_fast.errors import BackendError
from mnp_fast.ops import registry
from mnp_fast.ops.layout import dense_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def channel_magnitude(weights: Sequence[Tensor]) -> Tensor:
    """L1 norm, L2 norm and largest absolute value of every output channel of all layers, in one launch.

    A row of a weight is an output channel: all numbers with one index in dim 0. Sums are in float32, in an order that
    depends on the sizes alone. NaN in a row makes all three NaN; a row without numbers gives zeros.

    Args:
        weights: at least one tensor, all float32, bfloat16 or float16 and on one device, of any shape (rows, ...).
            Contiguous, channels_last and channels_last_3d memory is used as it is, any other is copied first.

    Returns:
        float32, (3, R), with the rows of all tensors one after the other: L1 norms, L2 norms, largest absolute values.
        Without gradient. In Triton it cannot be captured in a CUDA graph: the table of tensors is copied to the device.

    Raises:
        BackendError: arguments that do not fit, or a forced backend that cannot run.
    """
    with torch.no_grad():
        return _op(list(weights))


@torch.library.custom_op("mnp_fast::channel_magnitude", mutates_args=(), schema="(Tensor[] weights) -> Tensor")
def _definition(weights: list[Tensor]) -> Tensor:
    _check(weights)
    run = registry.kernel("channel_magnitude", weights[0].device, weights[0].dtype)
    found: Tensor = run([dense_rows(weight) for weight in weights])
    return found


@_definition.register_fake
def _fake(weights: list[Tensor]) -> Tensor:
    _check(weights)
    return weights[0].new_empty((3, sum(weight.shape[0] for weight in weights)), dtype=torch.float32)


_op = torch.ops.mnp_fast.channel_magnitude.default


def _check(weights: list[Tensor]) -> None:
    if not weights:
        raise BackendError("channel_magnitude: weights must hold at least one tensor")
    dtype, device = weights[0].dtype, weights[0].device
    if dtype not in DTYPES:
        raise BackendError(f"channel_magnitude: weights must be float32, bfloat16 or float16, not {dtype}: cast them")
    for weight in weights:
        if weight.dtype != dtype or weight.device != device:
            raise BackendError(
                f"channel_magnitude: weights must have one dtype and device; the first is {dtype} on {device}, another "
                f"{weight.dtype} on {weight.device}: cast or move them, or call once for each"
            )
        if weight.dim() == 0:
            raise BackendError("channel_magnitude: weights must have rows (dim 0), and one is a single number")
