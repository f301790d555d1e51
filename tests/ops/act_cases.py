"""What the tests of masked_act share: its inputs, and what plain torch in float64 says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from channel_cases import all_providers, leaf, providers, random_tensor, spread
from torch import Tensor

from mnp_fast.ops import masked_act

# (relative, absolute) error that float32 kernels may have against float64: outputs, then sums of up to 10^4 terms.
TOLERANCE = {torch.float32: {"output": (2e-6, 2e-6), "sum": (1e-4, 1e-4)}}
PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Case(NamedTuple):
    """Sizes and options of one call; memory: contiguous, channels_last or strided."""

    shape: tuple[int, ...]
    act: str = "gelu"
    channel_dim: int = -1
    memory: str = "contiguous"


CASES = [
    Case((2, 9, 264)),
    Case((2, 9, 264), "gelu_tanh"),
    Case((2, 9, 264), "relu"),
    Case((2, 9, 264), "silu"),
    Case((2, 9, 264), "quick_gelu"),
    Case((2, 50, 1500), "silu"),
    Case((3, 7, 5, 1), "relu"),
    Case((1, 5, 6, 3), "quick_gelu"),
    Case((5, 70), "gelu_tanh"),
    Case((3, 130, 1, 1), "silu", 1),
    Case((2, 3, 7, 5), "gelu", 1),
    Case((2, 3, 33, 41), "gelu_tanh", 1),
    Case((2, 17, 7, 5), "relu", 1, "channels_last"),
    Case((1, 64, 40, 40), "gelu", 1, "channels_last"),
    Case((2, 8, 3, 4, 3), "quick_gelu", 1, "channels_last"),
    Case((2, 5, 6, 4), "silu", 1, "strided"),
    Case((3, 4, 6), "gelu", -1, "strided"),
    Case((0, 4, 3), "gelu"),
    Case((2, 4, 0, 3), "silu", 1),
]


def case_id(case: Case) -> str:
    return f"{'x'.join(map(str, case.shape))}-{case.channel_dim}-{case.act}-{case.memory}"


ALL_PROVIDERS = all_providers("masked_act")
FLOAT32_PROVIDERS = providers("masked_act", torch.float32)


@dataclass
class Inputs:
    x: Tensor
    mask: Tensor
    grad: Tensor
    case: Case

    def results(self) -> dict[str, Tensor]:
        """Output and all gradients of the op."""
        x, mask = leaf(self.x), leaf(self.mask)
        y = masked_act(x, mask, act=self.case.act, channel_dim=self.case.channel_dim)
        y.backward(self.grad)
        return {"output y": y.detach(), "output grad_x": x.grad, "sum grad_mask": mask.grad}

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same in plain torch, every step of it in `dtype`."""
        x, mask = leaf(self.x, dtype), leaf(self.mask, dtype)
        y = spread(mask, x.dim(), self.case.channel_dim) * PLAIN[self.case.act](x)
        y.backward(self.grad.to(dtype))
        return {"output y": y.detach(), "output grad_x": x.grad, "sum grad_mask": mask.grad}


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    # Twice as wide as normal: the tails count too.
    x = random_tensor(case.shape, dtype, case.memory, generator).to(device) * 2
    grad = random_tensor(case.shape, dtype, case.memory, generator).to(device)
    mask = torch.rand(case.shape[case.channel_dim], generator=generator)
    mask[::3] = 0.0
    return Inputs(x, mask.to(device), grad, case)
