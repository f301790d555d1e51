"""What the tests of masked_affine share: who provides it here, its inputs, and what plain torch in float64 says."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mnp_fast.ops import force_backend, force_cpu_isa, masked_affine, why_not
from mnp_fast.ops.cpu_backend import usable_isas

# (relative, absolute) error that float32 kernels may have against float64: outputs, then sums of up to 10^4 terms.
TOLERANCE = {torch.float32: {"output": (1e-5, 1e-5), "sum": (1e-4, 1e-4)}}
# Narrow dtypes: our largest error is at most this many times that of plain torch in the same dtype.
RATIO = 2.0


class Provider(NamedTuple):
    """A backend that the same tests run on; `isa` for the CPU kernels alone."""

    backend: str
    device: str = "cpu"
    isa: str = "auto"

    def force(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(force_backend(self.backend))
        stack.enter_context(force_cpu_isa(self.isa))
        return stack


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


def providers(dtype: torch.dtype, op: str = "masked_affine") -> list:
    """Every provider of `op` for this dtype, as pytest parameters: of the CPU what can run here, and all of a GPU."""
    found = []
    if why_not("cpu", op, torch.device("cpu"), dtype) is None:
        found += [pytest.param(Provider("cpu", isa=isa), dtype, id=f"cpu-{isa}-{dtype}") for isa in usable_isas()]
    for backend in ("reference", "triton"):
        if why_not(backend, op, torch.device("cpu"), dtype) is None:
            found.append(pytest.param(Provider(backend), dtype, id=f"{backend}-{dtype}"))
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    for backend in ("reference", "triton", "cuda"):
        marks = [pytest.mark.gpu, no_gpu]
        found.append(pytest.param(Provider(backend, "cuda"), dtype, id=f"gpu-{backend}-{dtype}", marks=marks))
    return found


ALL_PROVIDERS = [p for dtype in (torch.float32, torch.bfloat16, torch.float16) for p in providers(dtype)]
FLOAT32_PROVIDERS = providers(torch.float32)


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
        mask, scale, center, shift = (spread(v, self.case) for v in vectors)
        y = mask * scale * (x - center) + shift
        if residual is not None:
            y = y + residual
        if self.case.act == "relu":
            y = y.relu()
        y.backward(self.grad.to(dtype))
        return collect(y, x, vectors, residual)


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    if tensor is None:
        return None
    # detach() keeps the strides, which clone() of a view would not.
    return (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_()


def spread(vector: Tensor, case: Case) -> Tensor:
    """A vector of channels in a shape that broadcasts against x."""
    return vector if case.channel_dim == -1 else vector.view(-1, *[1] * (len(case.shape) - 2))


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
        values = torch.randn(case.shape, generator=generator).to(dtype)
        if case.memory == "channels_last":
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            values = values.to(memory_format=formats[len(case.shape)])
        elif case.memory == "strided":
            # Every second number of something larger, which starts one number into its memory.
            values = (
                torch.stack((values, values), -1)
                .flatten()[1:]
                .as_strided(case.shape, [2 * stride for stride in values.stride()])
            )
        return values.to(device)

    x, grad = tensor(), tensor()
    residual = tensor() if case.residual else None
    mask = torch.rand(channels, generator=generator)
    mask[::3] = 0.0
    vectors = [mask, *(torch.randn(channels, generator=generator) for _ in range(3))]
    vectors = [v.to(device) for v in vectors]
    if case.act == "relu":
        # Where float32 and float64 may fall on different sides of zero nothing can be compared: no gradient there.
        wide = [spread(v.double(), case) for v in vectors]
        sign = wide[0] * wide[1] * (x.double() - wide[2]) + wide[3]
        if residual is not None:
            sign = sign + residual.double()
        grad = grad.masked_fill(sign.abs() < 0.02, 0.0)
    return Inputs(x, vectors, residual, grad, case)
