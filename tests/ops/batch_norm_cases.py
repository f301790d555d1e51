"""What the tests of masked_batch_norm share: its inputs, and what plain torch in float64 says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from affine_cases import Case
from channel_cases import all_providers, leaf, providers, random_tensor, spread
from torch import Tensor

from mnp_fast.ops import masked_batch_norm

EPS = 1e-3
CASES = [
    Case((3, 1, 7, 5)),
    Case((2, 3, 7, 5), act="relu"),
    Case((2, 17, 7, 5), act="relu", residual=True, memory="channels_last"),
    Case((2, 3, 33, 41), act="relu", memory="channels_last"),
    Case((2, 3, 33, 41), residual=True),
    Case((1, 2, 70, 70), act="relu"),
    Case((2, 40, 6, 6), act="relu", residual=True),
    Case((2, 24, 9, 5), act="relu", memory="channels_last"),
    Case((6, 130, 1, 1), act="relu", residual=True),
    Case((7, 70), act="relu"),
    Case((2, 8, 3, 4, 3), act="relu", memory="channels_last"),
    Case((2, 5, 6, 4), act="relu", residual=True, memory="strided"),
    # More than one part of memory for the sums, the last one on the CPU a single cut row in the second case.
    Case((1, 64, 33, 32), act="relu", memory="channels_last"),
    Case((2, 3, 135, 81), act="relu", residual=True, memory="channels_last"),
]

ALL_PROVIDERS = all_providers("masked_batch_norm")
FLOAT32_PROVIDERS = providers("masked_batch_norm", torch.float32)


@dataclass
class Inputs:
    x: Tensor
    vectors: list[Tensor]
    residual: Tensor | None
    grad: Tensor
    case: Case

    def results(self) -> dict[str, Tensor]:
        """Output and all gradients of the public function, and the statistics of the op."""
        x, residual = leaf(self.x), leaf(self.residual)
        vectors = [leaf(v) for v in self.vectors]
        y = masked_batch_norm(x, *vectors, residual, eps=EPS, act=self.case.act)
        y.backward(self.grad)
        op = torch.ops.mnp_fast.masked_batch_norm.default
        _, mean, rstd = op(self.x, *self.vectors, self.residual, EPS, self.case.act)
        return collect(y, x, vectors, residual, mean, rstd)

    def exact(self) -> dict[str, Tensor]:
        """The same in plain torch, every step of it in float64."""
        x, residual = leaf(self.x, torch.float64), leaf(self.residual, torch.float64)
        vectors = [leaf(v, torch.float64) for v in self.vectors]
        mask, weight, bias = (spread(v, x.dim(), 1) for v in vectors)
        others = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(others)
        centered = x - spread(mean, x.dim(), 1)
        rstd = 1 / (centered.square().mean(others) + EPS).sqrt()
        y = finish(mask * weight * centered * spread(rstd, x.dim(), 1) + bias, residual, self.case)
        y.backward(self.grad.double())
        return collect(y, x, vectors, residual, mean.detach(), rstd.detach())

    def plain(self) -> dict[str, Tensor]:
        """The same with torch's own batch norm, x in its own dtype."""
        x, residual = leaf(self.x), leaf(self.residual)
        vectors = [leaf(v) for v in self.vectors]
        mask, weight, bias = vectors
        y = finish(F.batch_norm(x, None, None, mask * weight, bias, training=True, eps=EPS), residual, self.case)
        y.backward(self.grad)
        exact = self.exact()
        return collect(y, x, vectors, residual, exact["sum mean"], exact["sum rstd"])


def finish(y: Tensor, residual: Tensor | None, case: Case) -> Tensor:
    if residual is not None:
        y = y + residual
    return y.relu() if case.act == "relu" else y


def collect(
    y: Tensor, x: Tensor, vectors: list[Tensor], residual: Tensor | None, mean: Tensor, rstd: Tensor
) -> dict[str, Tensor]:
    found = {"output y": y.detach(), "output grad_x": x.grad}
    if residual is not None:
        found["output grad_residual"] = residual.grad
    for name, vector in zip(("mask", "weight", "bias"), vectors, strict=True):
        found[f"sum grad_{name}"] = vector.grad
    return found | {"sum mean": mean, "sum rstd": rstd}


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    channels = case.shape[1]

    def tensor() -> Tensor:
        return random_tensor(case.shape, dtype, case.memory, generator).to(device)

    x, grad = tensor(), tensor()
    residual = tensor() if case.residual else None
    mask = torch.rand(channels, generator=generator)
    mask[::3] = 0.0
    vectors = [v.to(device) for v in (mask, *(torch.randn(channels, generator=generator) for _ in range(2)))]
    inputs = Inputs(x, vectors, residual, grad, case)
    if case.act == "relu":
        # Where float32 and float64 may fall on different sides of zero nothing can be compared: no gradient there.
        before = Inputs(x, vectors, residual, grad, case._replace(act="none")).exact()["output y"]
        inputs.grad = grad.masked_fill(before.abs() < 0.02, 0.0)
    return inputs
