"""3x3 convolutions by transformed products: every instruction set against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mnp_fast.errors import BackendError
from mnp_fast.frozen import FrozenConv2d
from mnp_fast.ops import force_backend, force_cpu_isa, why_not, winograd
from mnp_fast.ops.cpu_backend import usable_isas

CPU = torch.device("cpu")
ISAS = usable_isas() if why_not("cpu", "winograd", CPU, torch.float32) is None else []


def kernel(isa: str):
    with force_backend("cpu"), force_cpu_isa(isa):
        found = winograd.kernel(torch.empty(32, 32, 3, 3))
    assert found is not None
    return found


# (n, in, out, height, width, padding)
SHAPES = [
    (1, 32, 32, 8, 8, (1, 1)),
    (3, 40, 33, 9, 7, (1, 0)),
    (2, 3, 5, 5, 11, (0, 1)),
    (1, 1, 1, 3, 3, (0, 0)),
    (2, 17, 70, 6, 6, (2, 2)),
    (1, 8, 8, 1, 1, (1, 1)),
    (5, 33, 64, 21, 18, (1, 1)),  # more tiles than pass at once
    (7, 130, 128, 10, 10, (1, 1)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_torch_in_float64(shape, isa):
    n, before, out, height, width, padding = shape
    torch.manual_seed(0)
    x = torch.randn(n, before, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, before, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=padding)
    with force_backend("cpu"), force_cpu_isa(isa):
        y = kernel(isa)(x, winograd.transformed(weight), out, padding)
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert float((y - exact).norm()) <= 4e-6 * float(exact.norm())
    plain = F.conv2d(x, weight, padding=padding)
    # The largest error: that of float32 with some ten times as many roundings.
    assert float((y - exact).abs().max()) <= 30 * float((plain - exact).abs().max()) + 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_written_beside_the_result(isa):
    # 5x5 results are four tiles of 4x4: most of three of them lies outside.
    x, weight = torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(2, 4, 3, 3)
    u = winograd.transformed(weight)
    with force_backend("cpu"), force_cpu_isa(isa):
        first = kernel(isa)(x, u, 2, (1, 1))
        # Numbers that are not finite stay where they are seen from.
        x[0, :, 0, 0] = float("nan")
        second = kernel(isa)(x, u, 2, (1, 1))
    assert first.isfinite().all()
    assert second[0, :, :2, :2].isnan().all()
    assert torch.equal(first[0, :, 4, 4], second[0, :, 4, 4])


def test_empty():
    with force_backend("cpu"):
        run = kernel("scalar")
        u = winograd.transformed(torch.randn(32, 32, 3, 3))
        assert run(torch.empty(0, 32, 8, 8), u, 32, (1, 1)).shape == (0, 32, 8, 8)


def test_stays_inside_its_memory():
    kernel("scalar")
    native = torch.ops.mnp_fast_cpu.winograd.default
    x, u = torch.randn(2, 4, 6, 6), winograd.transformed(torch.randn(5, 4, 3, 3))
    with pytest.raises(RuntimeError, match="not channels_last"):
        native(x, u, 5, 1, 1, 0)
    x = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="u has"):
        native(x, u, 64, 1, 1, 0)
    with pytest.raises(RuntimeError, match="smaller than the filter"):
        native(x[:, :, :2, :2].contiguous(memory_format=torch.channels_last), u, 5, 0, 0, 0)
    with pytest.raises(RuntimeError, match="not float32"):
        native(x.bfloat16(), u, 5, 1, 1, 0)


def test_only_where_it_pays_and_where_the_kernels_are_wanted():
    assert winograd.pays((4, 64, 14, 14), (1, 1))
    assert not winograd.pays((4, 64, 2, 2), (1, 1))  # tiles of mostly nothing
    assert not winograd.pays((1, 64, 8, 8), (1, 1))  # the filters would be read for four tiles
    assert winograd.kernel(torch.empty(16, 64, 3, 3)) is None
    assert winograd.kernel(torch.empty(64, 64, 1, 1)) is None
    assert winograd.kernel(torch.empty(64, 64, 3, 3, dtype=torch.bfloat16)) is None
    with force_backend("reference"):
        assert winograd.kernel(torch.empty(64, 64, 3, 3)) is None
    with force_backend("cpu"):
        assert winograd.kernel(torch.empty(64, 64, 3, 3)) is not None


@pytest.mark.parametrize("onto", [False, True])
def test_a_frozen_convolution_and_its_gradient(onto):
    torch.manual_seed(0)
    weight = torch.randn(40, 36, 3, 3)
    with force_backend("cpu"):
        layer = FrozenConv2d(weight, None, (1, 1), (1, 1), (1, 1), 1)
    assert layer._winograd is not None
    x = torch.randn(3, 36, 12, 9).contiguous(memory_format=torch.channels_last)
    exact = x.double().requires_grad_()
    y = F.conv2d(exact, weight.double(), padding=1)
    grad = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(y, exact, grad.double())
    before = torch.randn_like(x) if onto else None
    found = layer.back(grad, x.shape, None if before is None else before.clone())
    if before is not None:
        expected = expected + before
    assert float((layer.run(x) - y).detach().norm()) <= 4e-6 * float(y.detach().norm())
    assert float((found - expected).norm()) <= 4e-6 * float(expected.norm())


def test_a_forced_backend_that_is_not_there_is_an_error():
    x, u = torch.randn(1, 32, 8, 8), winograd.transformed(torch.randn(32, 32, 3, 3))
    with force_backend("cpu"), force_cpu_isa("neon"):
        run = winograd.kernel(torch.empty(32, 32, 3, 3))
        assert run is not None
        with pytest.raises(BackendError, match="neon"):
            run(x, u, 32, (1, 1))
