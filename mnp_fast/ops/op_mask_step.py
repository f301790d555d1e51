"""mask_step: schema, argument checks and fake kernel. The kernels are in the backends."""

from __future__ import annotations

import torch
from torch import Tensor

from mnp_fast.errors import BackendError
from mnp_fast.ops import registry


def mask_step_(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, *, rate: float, decay: float, penalty: float
) -> None:
    """One step of the masks, projected on [0, 1], in place and in one launch.

    momentum = decay·momentum + grad + penalty·magnitude, where penalty·magnitude is the gradient of the weight penalty
    penalty·Σ mask·magnitude; then mask = clamp(mask - rate·momentum, 0, 1). NaN in the gradient stays NaN.

    Args:
        mask, momentum: float32, (neurons,), contiguous, changed in place. A mask that requires a gradient is changed
            as an optimizer does it, outside of autograd.
        grad, magnitude: float32, (neurons,), on the device of the mask. Copied first where they are not contiguous.
        rate, decay, penalty: rounded to float32. Every product and sum is rounded by itself, so that the kernels of all
            backends give the same bits.

    Raises:
        BackendError: arguments that do not fit, or a forced backend that cannot run.
    """
    with torch.no_grad():
        _op(mask, momentum, grad, magnitude, rate, decay, penalty)


# Defined by itself: the wrappers of custom_op cost 20 us a call, more than the three lines of plain torch.
torch.library.define(
    "mnp_fast::mask_step",
    "(Tensor(a!) mask, Tensor(b!) momentum, Tensor grad, Tensor magnitude, float rate, float decay, float penalty) "
    "-> ()",
)


@torch.library.impl("mnp_fast::mask_step", "CompositeExplicitAutograd")
def _step(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, rate: float, decay: float, penalty: float
) -> None:
    _check(mask, momentum, grad, magnitude)
    run = registry.kernel("mask_step", mask.device, mask.dtype)
    run(mask, momentum, grad.contiguous(), magnitude.contiguous(), rate, decay, penalty)
    # Autograd refuses a backward through what it saved before.
    torch.autograd.graph.increment_version([tensor for tensor in (mask, momentum) if not tensor.is_inference()])


@torch.library.register_fake("mnp_fast::mask_step")
def _fake(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, rate: float, decay: float, penalty: float
) -> None:
    _check(mask, momentum, grad, magnitude)


_op = torch.ops.mnp_fast.mask_step.default


def _check(mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor) -> None:
    shape, device = mask.shape, mask.device
    if mask.dim() != 1:
        raise BackendError(f"mask_step_: mask must have the shape (neurons,), not {tuple(shape)}")
    for name, tensor in (("mask", mask), ("momentum", momentum), ("grad", grad), ("magnitude", magnitude)):
        if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device != device:
            raise BackendError(
                f"mask_step_: {name} must be torch.float32 of shape {tuple(shape)} on {device}, like the mask; it is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    for name, tensor in (("mask", mask), ("momentum", momentum)):
        if not tensor.is_contiguous():
            raise BackendError(
                f"mask_step_: {name} is changed in place and must be contiguous, not of stride {tensor.stride()}: "
                "pass its contiguous copy"
            )
