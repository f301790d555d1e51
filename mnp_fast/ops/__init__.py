"""Fused operations under a mask, each with a plain-torch reference and C++, CUDA and Triton kernels.

Importing this package needs torch alone: kernels are looked for when an op is first called.
"""

from mnp_fast.ops.op_channel_magnitude import channel_magnitude
from mnp_fast.ops.op_mask_step import mask_step_
from mnp_fast.ops.op_masked_act import masked_act
from mnp_fast.ops.op_masked_affine import masked_affine
from mnp_fast.ops.op_masked_batch_norm import masked_batch_norm
from mnp_fast.ops.registry import BACKENDS, available, force_backend, force_cpu_isa, why_not

__all__ = [
    "BACKENDS",
    "available",
    "channel_magnitude",
    "force_backend",
    "force_cpu_isa",
    "mask_step_",
    "masked_act",
    "masked_affine",
    "masked_batch_norm",
    "why_not",
]
