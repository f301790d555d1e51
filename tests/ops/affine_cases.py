"""What the tests of masked_affine share: who provides it here, its inputs, and what plain torch in float64 says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from channel_cases import all_providers, leaf, providers, random_tensor, spread
from torch import Tensor

from mnp_fast.ops import masked_affine

# (relative, absolute) error that float32 kernels may have against float64: outputs, then sums of up to 10^4 terms.
TOLERANCE = {torch.float32: {"output": (1e-5, 1e-5), "sum": (1e-4, 1e-4)}}


class Case(NamedTuple):
    """Sizes and options of one call; memory: contiguous, channels_last or strided."""

    shape: tuple[int, ...]
    channel_dim: int = 1
    act: str = "none"
    residual: bool = False
    memory: str = "contiguous"


CASES = [
    Case((3, 1, 7, 5)),
    Case((2, 3, 7, 5), act="relu"),
    Case((2, 17, 7, 5), act="relu", residual=True, memory="channels_last"),
    Case((2, 3, 33, 41), act="relu", memory="channels_last"),
    Case((2, 3, 33, 41), residual=True),
    Case((2, 40, 6, 6), act="relu", residual=True),
    Case((2, 24, 9, 5), act="relu", memory="channels_last"),
    Case((3, 130, 1, 1), act="relu", residual=True),
    Case((5, 70), act="relu"),
    Case((2, 9, 264), channel_dim=-1, residual=True),
    Case((1, 5, 6, 3), channel_dim=-1, act="relu", residual=True),
    Case((2, 8, 3, 4, 3), act="relu", memory="channels_last"),
    Case((2, 5, 6, 4), act="relu", residual=True, memory="strided"),
    Case((1, 64, 40, 40), act="relu", memory="channels_last"),
    Case((0, 4, 3, 3), act="relu", residual=True),
    Case((2, 4, 0, 3), residual=True),
]


def case_id(case: Case) -> str:
    sizes = "x".join(map(str, case.shape))
    return f"{sizes}-{case.channel_dim}-{case.act}{'-residual' if case.residual else ''}-{case.memory}"


ALL_PROVIDERS = all_providers("masked_affine")
FLOAT32_PROVIDERS = providers("masked_affine", torch.float32)


@dataclass
class Inputs:
    x: Tensor
    vectors: list[Tensor]
    residual: Tensor | None
    grad: Tensor
    case: Case

    def results(self) -> dict[str, Tensor]:
        """Output and all gradients of the op."""
        x, residual = leaf(self.x), leaf(self.residual)
        vectors = [leaf(v) for v in self.vectors]
        y = masked_affine(x, *vectors, residual, channel_dim=self.case.channel_dim, act=self.case.act)
        y.backward(self.grad)
        return collect(y, x, vectors, residual)

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same in plain torch, every step of it in `dtype`."""
        x, residual = leaf(self.x, dtype), leaf(self.residual, dtype)
        vectors = [leaf(v, dtype) for v in self.vectors]
        mask, scale, center, shift = (spread(v, x.dim(), self.case.channel_dim) for v in vectors)
        y = mask * scale * (x - center) + shift
        if residual is not None:
            y = y + residual
        if self.case.act == "relu":
            y = y.relu()
        y.backward(self.grad.to(dtype))
        return collect(y, x, vectors, residual)


def collect(y: Tensor, x: Tensor, vectors: list[Tensor], residual: Tensor | None) -> dict[str, Tensor]:
    found = {"output y": y.detach(), "output grad_x": x.grad}
    if residual is not None:
        found["output grad_residual"] = residual.grad
    for name, vector in zip(("mask", "scale", "center", "shift"), vectors, strict=True):
        found[f"sum grad_{name}"] = vector.grad
    return found


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    channels = case.shape[case.channel_dim]

    def tensor() -> Tensor:
        return random_tensor(case.shape, dtype, case.memory, generator).to(device)

    x, grad = tensor(), tensor()
    residual = tensor() if case.residual else None
    mask = torch.rand(channels, generator=generator)
    mask[::3] = 0.0
    vectors = [mask, *(torch.randn(channels, generator=generator) for _ in range(3))]
    vectors = [v.to(device) for v in vectors]
    if case.act == "relu":
        # Where float32 and float64 may fall on different sides of zero nothing can be compared: no gradient there.
        wide = [spread(v.double(), x.dim(), case.channel_dim) for v in vectors]
        sign = wide[0] * wide[1] * (x.double() - wide[2]) + wide[3]
        if residual is not None:
            sign = sign + residual.double()
        grad = grad.masked_fill(sign.abs() < 0.02, 0.0)
    return Inputs(x, vectors, residual, grad, case)
