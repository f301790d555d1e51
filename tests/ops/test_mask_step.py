"""mask_step_: every provider against plain torch in float64, and the promises of the op's own docstring."""

from __future__ import annotations

import pytest
import torch
from channel_cases import Provider, providers
from torch import Tensor

from mnp_fast.errors import BackendError
from mnp_fast.ops import force_backend, mask_step_
from mnp_fast.ops.cpu_backend import usable_isas

OP = torch.ops.mnp_fast.mask_step.default
PROVIDERS = providers("mask_step", torch.float32)
SETTINGS = {"rate": 0.3, "decay": 0.9, "penalty": 0.37}


def make(neurons: int, device: str = "cpu", start: int = 0) -> list[Tensor]:
    """mask, momentum, grad, magnitude; `start`: numbers of their memory in front of each."""
    generator = torch.Generator().manual_seed(neurons)
    tensors = [torch.randn(neurons, generator=generator) for _ in range(4)]
    tensors[0] = tensors[0].abs().clamp(max=1.0)
    tensors[3] = tensors[3].abs()
    return [torch.cat((torch.zeros(start), tensor)).to(device)[start:] for tensor in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("neurons", [0, 1, 3, 16, 33, 1000, 2600])
@pytest.mark.parametrize(("provider", "dtype"), PROVIDERS)
def test_matches_plain_torch_in_float64(provider, dtype, neurons, start):
    mask, momentum, grad, magnitude = make(neurons, provider.device, start)
    wide = [tensor.double() for tensor in (mask, momentum, grad, magnitude)]
    with provider.force():
        for _ in range(3):
            mask_step_(mask, momentum, grad, magnitude, **SETTINGS)
            penalised = wide[0].requires_grad_()
            (pull,) = torch.autograd.grad(0.37 * (penalised * wide[3]).sum(), penalised)
            wide[1] = 0.9 * wide[1] + wide[2] + pull
            wide[0] = (wide[0].detach() - 0.3 * wide[1]).clamp(0.0, 1.0)
    torch.testing.assert_close(momentum.double(), wide[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mask.double(), wide[0], rtol=1e-6, atol=1e-6)
    if neurons >= 1000:
        assert {0.0, 1.0} < set(mask.tolist())


@pytest.mark.parametrize(("provider", "dtype"), PROVIDERS)
def test_bits_are_those_of_the_scalar_kernel_and_of_plain_torch(provider, dtype):
    found = []
    isas = [Provider("cpu", isa="scalar")] if usable_isas() else []
    for other in (provider, *isas, Provider("reference")):
        tensors = make(2603, other.device, start=1)
        tensors[0][:4] = torch.tensor([-0.0, 0.0, 1.0, 1e-40])
        tensors[1][:2] = 0.0
        tensors[2][:2] = 0.0
        tensors[3][:2] = 0.0
        with other.force():
            for _ in range(5):
                mask_step_(*tensors, **SETTINGS)
        found.append(tensors)
    for other in found[1:]:
        assert same_bits(found[0][1], other[1])
        # -0 and 0 are one mask; which of them is left is not told.
        assert same_bits(found[0][0] + 0.0, other[0] + 0.0)


@pytest.mark.parametrize(("provider", "dtype"), PROVIDERS)
def test_not_finite_gradients_are_not_hidden(provider, dtype):
    tensors = make(40, provider.device)
    tensors[2][::7] = float("nan")
    tensors[2][1], tensors[2][2] = float("inf"), -float("inf")
    with provider.force():
        mask_step_(*tensors, **SETTINGS)
    mask, momentum = tensors[:2]
    nan = torch.zeros(40, dtype=torch.bool, device=provider.device)
    nan[::7] = True
    assert torch.equal(mask.isnan(), nan)
    assert torch.equal(momentum.isnan(), nan)
    assert mask[1:3].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("provider", "dtype"), PROVIDERS)
def test_only_mask_and_momentum_change_and_views_of_the_mask_see_it(provider, dtype):
    mask, momentum, grad, magnitude = make(50, provider.device)
    before = [tensor.clone() for tensor in (grad, magnitude)]
    view, old = mask[10:20], mask.clone()
    versions = mask._version, momentum._version
    with provider.force():
        mask_step_(mask, momentum, grad, magnitude, **SETTINGS)
    assert torch.equal(grad, before[0])
    assert torch.equal(magnitude, before[1])
    assert torch.equal(view, mask[10:20])
    assert not torch.equal(mask, old)
    # Autograd must know that they changed.
    assert mask._version > versions[0]
    assert momentum._version > versions[1]


@pytest.mark.parametrize(("provider", "dtype"), PROVIDERS)
def test_opcheck(provider, dtype):
    with provider.force():
        torch.library.opcheck(OP, (*make(37, provider.device), 0.1, 0.9, 0.01))


@pytest.mark.parametrize("neurons", [70_001, 200_000])
def test_threads_do_not_change_a_bit(neurons):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(make(neurons))
            mask_step_(*found[-1], **SETTINGS)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_mask_that_requires_a_gradient():
    mask, momentum, grad, magnitude = make(20)
    expected = mask.clone()
    mask.requires_grad_()
    loss = (mask * mask).sum()
    mask_step_(mask, momentum.clone(), grad, magnitude, **SETTINGS)
    mask_step_(expected, momentum, grad, magnitude, **SETTINGS)
    assert mask.is_leaf
    assert mask.requires_grad
    assert torch.equal(mask.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_and_expanded_gradients():
    with torch.inference_mode():
        tensors = make(20)
        copy = [tensor.clone() for tensor in tensors]
        number = torch.tensor(0.25)
        mask_step_(*tensors[:2], number.expand(20), number.expand(20), **SETTINGS)
        mask_step_(*copy[:2], torch.full((20,), 0.25), torch.full((20,), 0.25), **SETTINGS)
    assert torch.equal(tensors[0], copy[0])


def test_compiles_into_one_graph():
    def step(mask, momentum, grad, magnitude):
        mask_step_(mask, momentum, 2 * grad, magnitude, **SETTINGS)
        return mask.sum()

    ours, compiled = make(30), make(30)
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled), step(*ours))
    assert all(torch.equal(a, b) for a, b in zip(ours, compiled, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(2, 4)}, r"mask must have the shape \(neurons,\)"),
        ({"mask": torch.ones(4, dtype=torch.float64)}, "mask must be torch.float32"),
        ({"momentum": torch.ones(3)}, r"momentum must be torch.float32 of shape \(4,\)"),
        ({"grad": torch.ones(4, dtype=torch.bfloat16)}, "grad must be torch.float32"),
        ({"magnitude": torch.ones(4, device="meta")}, "magnitude must be .* on cpu"),
        ({"mask": torch.ones(8)[::2]}, "mask is changed in place and must be contiguous"),
        ({"momentum": torch.ones(1).expand(4)}, "momentum is changed in place and must be contiguous"),
    ],
)
def test_wrong_arguments_name_what_is_wrong(change, message):
    arguments = {name: torch.ones(4) for name in ("mask", "momentum", "grad", "magnitude")}
    with pytest.raises(BackendError, match=message):
        mask_step_(**(arguments | change), **SETTINGS)


def test_native_op_stays_inside_its_memory():
    # Called without the Python checks: an error, and not memory of others.
    with force_backend("cpu"):
        mask_step_(*make(4), **SETTINGS)
    native = torch.ops.mnp_fast_cpu.mask_step.default
    ones, settings = [torch.ones(4)] * 3, (0.1, 0.9, 0.0)
    for index, name in enumerate(("mask", "momentum", "grad", "magnitude")):
        strided, wide = [torch.ones(4) for _ in range(4)], [torch.ones(4) for _ in range(4)]
        strided[index], wide[index] = torch.ones(8)[::2], torch.ones(4, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=f"{name} is not dense"):
            native(*strided, *settings, 0)
        with pytest.raises(RuntimeError, match=f"{name} is not float32"):
            native(*wide, *settings, 0)
    with pytest.raises(RuntimeError, match="momentum has 3 numbers"):
        native(torch.ones(4), torch.ones(3), *ones[:2], *settings, 0)
    with pytest.raises(RuntimeError, match="instruction set"):
        native(*ones, torch.ones(4), *settings, 9)
