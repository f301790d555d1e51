"""What the tests of all ops share: who provides an op here, tensors in every memory, errors of narrow dtypes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mnp_fast.ops import force_backend, force_cpu_isa, why_not
from mnp_fast.ops.cpu_backend import usable_isas

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


def providers(op: str, dtype: torch.dtype) -> list:
    """Every provider of this op and dtype, as pytest parameters: those of the CPU that can run here, and of a GPU."""
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


def all_providers(op: str) -> list:
    return [p for dtype in (torch.float32, torch.bfloat16, torch.float16) for p in providers(op, dtype)]


def assert_ratio(name: str, value: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The largest error of `value` is at most RATIO times that of plain torch in the same dtype."""
    if not value.numel():
        return
    error = (value.double() - exact).abs().max()
    allowed = RATIO * (plain.double() - exact).abs().max()
    # Where plain torch happens to be exact, one rounding of the largest number is allowed.
    allowed = max(allowed, torch.finfo(plain.dtype).eps * exact.abs().max())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    if tensor is None:
        return None
    # detach() keeps the strides, which clone() of a view would not.
    return (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_()


def spread(vector: Tensor, dims: int, channel_dim: int) -> Tensor:
    """A vector of channels in a shape that broadcasts against a tensor of `dims` dimensions."""
    return vector if channel_dim == -1 else vector.view(-1, *[1] * (dims - 2))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, memory: str, generator: torch.Generator) -> Tensor:
    """Normal numbers; memory: contiguous, channels_last or strided."""
    values = torch.randn(shape, generator=generator).to(dtype)
    if memory == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.to(memory_format=formats[len(shape)])
    if memory == "strided":
        # Every second number of something larger, which starts one number into its memory.
        doubled = torch.stack((values, values), -1).flatten()[1:]
        return doubled.as_strided(shape, [2 * stride for stride in values.stride()])
    return values
