"""channel_magnitude: every provider against plain torch in float64, and the promises of the op's own docstring."""

from __future__ import annotations

import pytest
import torch
from channel_cases import all_providers, providers
from torch import Tensor

from mnp_fast.errors import BackendError
from mnp_fast.ops import channel_magnitude, force_backend

OP = torch.ops.mnp_fast.channel_magnitude.default
# Relative error against float64 of the same numbers, whatever their dtype: products and sums are in float32.
TOLERANCE = 2e-6
ALL_PROVIDERS = all_providers("channel_magnitude")
FLOAT32_PROVIDERS = providers("channel_magnitude", torch.float32)

# Rows of one number, shorter than a vector, of odd length, longer than what a warp takes and than a block of sums; no
# rows, and rows without numbers, also first and last.
SHAPES = [(3, 0), (7,), (5, 3, 7, 7), (0, 4), (9, 64, 1, 1), (2, 2, 3, 4, 3), (3, 528), (3, 1, 3), (2, 9001), (0, 0)]


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def expected(weights: list[Tensor]) -> Tensor:
    """The same row by row, in float64."""
    found = []
    for weight in weights:
        for row in weight.double().reshape(len(weight), weight[0].numel() if len(weight) else 1):
            sizes = row.abs().tolist() or [0.0]
            largest = float("nan") if any(size != size for size in sizes) else max(sizes)
            found.append([sum(sizes), sum(size * size for size in sizes) ** 0.5, largest])
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 3).T


def check(found: Tensor, weights: list[Tensor]) -> None:
    assert found.dtype == torch.float32
    assert found.device == weights[0].device
    torch.testing.assert_close(found.double().cpu(), expected(weights), rtol=TOLERANCE, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_matches_plain_torch_in_float64(provider, dtype):
    weights = make(SHAPES, dtype, provider.device)
    with provider.force():
        found = channel_magnitude(weights)
        check(found, weights)
        # One call for all gives what a call for each does.
        assert torch.equal(found, torch.cat([channel_magnitude([weight]) for weight in weights], 1))
    # The largest number is none but itself.
    assert torch.equal(found[2].double().cpu(), expected(weights)[2])


@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_matches_in_every_memory_order_and_view(provider, dtype):
    base, wide = make([(9, 6, 5, 3), (4, 5, 2, 3, 3)], dtype, provider.device)
    offset = make([(1 + 7 * 33,)], dtype, provider.device)[0][1:].view(7, 33)  # starts beside any boundary
    weights = [
        base.to(memory_format=torch.channels_last),
        wide.to(memory_format=torch.channels_last_3d),
        base[2:],
        base[:, 1:],
        base[::2, :, ::2],
        base.transpose(0, 1),
        base[:1].expand(3, 6, 5, 3),
        offset,
        offset.t(),
    ]
    with provider.force():
        check(channel_magnitude(weights), weights)


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_more_tensors_than_one_table_holds(provider, dtype):
    # 128 is what the CUDA kernels send at least with one launch, 1024 what they send at most.
    for count in (129, 1030):
        weights = make([(1 + i % 2, 1 + i % 5) for i in range(count)], dtype, provider.device)
        with provider.force():
            check(channel_magnitude(weights), weights)


@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_not_finite_numbers(provider, dtype):
    weights = make([(6, 70), (4, 3)], dtype, provider.device)
    for row, column, value in ((0, 0, "nan"), (1, 69, "nan"), (2, 40, "inf"), (3, 33, "-inf")):
        weights[0][row, column] = float(value)
    # NaN beside infinity, in front of it and behind it.
    weights[0][4, 5:7] = torch.tensor([float("nan"), float("inf")])
    weights[0][5, 5:7] = torch.tensor([float("inf"), float("nan")])
    with provider.force():
        found = channel_magnitude(weights)
    check(found, weights)
    assert found[:, [0, 1, 4, 5]].isnan().all()
    assert found[:, 2:4].isposinf().all()
    assert found[:, 6:].isfinite().all()


@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_sums_do_not_lose_small_numbers(provider, dtype):
    # One running sum in float32 stops at 2^24 times a number, and in the dtype itself long before.
    weights = [torch.full((2, 300_000), 0.1, device=provider.device).to(dtype)]
    with provider.force():
        found = channel_magnitude(weights).double().cpu()
    value = float(weights[0][0, 0])
    exact = torch.tensor([3e5 * value, 3e5**0.5 * value, value], dtype=torch.float64)
    torch.testing.assert_close(found, exact[:, None].expand(3, 2), rtol=2e-5, atol=0.0)


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_opcheck(provider, dtype):
    with provider.force():
        torch.library.opcheck(OP, (make([(3, 2, 3, 3), (4,), (2, 0)], dtype, provider.device),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    weights = make([(64, 147), (3, 20_011), (300, 0), (1000,), (130, 512), (1, 70_000)], dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(channel_magnitude(weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    check(found[0], weights)


def test_there_is_no_gradient():
    weight = torch.randn(3, 4, requires_grad=True)
    assert not channel_magnitude([weight]).requires_grad


def test_compiles_into_one_graph():
    weights = make([(3, 5), (4, 2, 3, 3)])
    compiled = torch.compile(lambda *w: channel_magnitude(w).sum(1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(*weights), channel_magnitude(weights).sum(1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least one tensor"),
        ([torch.ones(2, 3, dtype=torch.int64)], "float32, bfloat16 or float16, not torch.int64: cast"),
        ([torch.ones(2, 3, dtype=torch.float64)], "not torch.float64: cast"),
        ([torch.ones(2), torch.ones(2, dtype=torch.bfloat16)], "one dtype and device.* cast or move"),
        ([torch.ones(2), torch.ones(2, device="meta")], "one dtype and device"),
        ([torch.ones(2), torch.ones(())], "single number"),
    ],
)
def test_wrong_arguments_name_what_is_wrong(weights, message):
    with pytest.raises(BackendError, match=message):
        channel_magnitude(weights)


def test_native_op_stays_inside_its_memory():
    # Called without the Python checks: an error, and not memory of others.
    with force_backend("cpu"):
        channel_magnitude([torch.ones(2)])
    native = torch.ops.mnp_fast_cpu.channel_magnitude.default
    for weights, message in (
        ([torch.ones(())], "without rows"),
        ([torch.ones(4, 6)[:, ::2]], "not dense"),
        ([torch.ones(3), torch.ones(3, dtype=torch.bfloat16)], "several dtypes"),
        ([torch.ones(3, dtype=torch.float16)], "neither float32 nor bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native(weights, 0)
    with pytest.raises(RuntimeError, match="instruction set"):
        native([torch.ones(3)], 9)
