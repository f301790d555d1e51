"""masked_act: every provider against plain torch in float64, and the promises of the op's own docstring."""

from __future__ import annotations

import pytest
import torch
from act_cases import ALL_PROVIDERS, CASES, FLOAT32_PROVIDERS, PLAIN, TOLERANCE, Case, case_id, make_inputs
from channel_cases import assert_ratio

from mnp_fast.errors import BackendError
from mnp_fast.ops import force_backend, masked_act
from mnp_fast.ops.op_masked_act import ACTIVATIONS

FORWARD = torch.ops.mnp_fast.masked_act.default
BACKWARD = torch.ops.mnp_fast.masked_act_backward.default


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_matches_plain_torch_in_float64(provider, dtype, case):
    inputs = make_inputs(case, dtype, provider.device)
    with provider.force():
        ours = inputs.results()
    exact = inputs.plain(torch.float64)
    plain = None if dtype in TOLERANCE else inputs.plain(dtype)
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == (dtype if name.startswith("output") else torch.float32), name
        if plain is None or name.startswith("sum"):
            # Sums are in float32 whatever the dtype of x; in bfloat16 smooth curves are fits, good to half a bit of it.
            fits = plain is not None and case.act != "relu"
            rtol, atol = (2**-9, 2**-9) if fits else TOLERANCE[torch.float32][name.split()[0]]
            torch.testing.assert_close(
                value.double(), exact[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert_ratio(name, value, exact[name], plain[name])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_every_number_is_right(provider, dtype, act):
    # Every size from the smallest to the largest float, zeros of both signs, and the range in between densely.
    powers = torch.logspace(-44, 38, 1500, dtype=torch.float64).float()
    x = torch.cat((torch.linspace(-14, 14, 20001), powers, -powers, torch.tensor([0.0, -0.0]))).to(provider.device)
    x = x.view(1, -1, 1)
    one = torch.ones(1, device=provider.device)
    leaf = x.double().requires_grad_()
    exact = PLAIN[act](leaf)
    # Where float64 itself overflows on the way, the limit is meant.
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    slope = torch.where(leaf.abs() < 1e3, slope, (leaf > 0).double())
    exact = torch.where(leaf.abs() < 1e3, exact, leaf.clamp(min=0)).detach()
    with provider.force():
        y = masked_act(x, one, act=act)
        grad_x, _ = BACKWARD(torch.ones_like(x), x, one, -1, act, True)
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad_x.double(), slope, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_not_finite_numbers(provider, dtype, act):
    values = torch.randn(1, 37, 3)
    values[0, ::5, 0], values[0, ::5, 1], values[0, ::5, 2] = float("nan"), float("inf"), -float("inf")
    x = values.to(dtype).to(provider.device)
    ones = torch.ones(3, device=provider.device)
    with provider.force():
        y = masked_act(x, ones, act=act)
        grad_x, sums = BACKWARD(torch.ones_like(x), x, ones, -1, act, True)
    assert torch.equal(y.isnan(), x.isnan())
    assert y[0, ::5, 1].isposinf().all()
    assert y[0, ::5, 2].abs().max() < 1e-6
    # As torch's own relu: what is not a number lets the gradient through.
    assert torch.equal(grad_x.isnan(), x.isnan() & torch.tensor(act != "relu", device=x.device))
    torch.testing.assert_close(grad_x[0, ::5, 1], torch.ones_like(x[0, ::5, 1]))
    assert grad_x[0, ::5, 2].abs().max() < 1e-6
    assert sums[0].isnan().tolist() == [True, False, False]
    if dtype == torch.float32:
        # All bits of this one are set: as an integer in the exponent it would become a number.
        full = torch.tensor([0x7FFFFFFF], dtype=torch.int32, device=provider.device).view(torch.float32).view(1, 1, 1)
        with provider.force():
            assert masked_act(full, ones[:1], act=act).isnan().all()
            assert BACKWARD(ones.view(1, 3, 1)[:, :1], full, ones[:1], -1, act, True)[1].isnan().all()


@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_a_closed_relu_lets_no_gradient_through_whatever_it_is(provider, dtype):
    x = torch.tensor([-1.0, 0.0, 2.0]).repeat_interleave(13).to(dtype).to(provider.device)
    grad = torch.full_like(x, torch.inf)
    grad[1::2] = torch.nan
    with provider.force():
        grad_x, _ = BACKWARD(grad.view(1, -1, 1), x.view(1, -1, 1), torch.ones(39, device=x.device), 1, "relu", True)
        last, _ = BACKWARD(grad.view(1, -1), x.view(1, -1), torch.ones(39, device=x.device), 1, "relu", True)
    for found in (grad_x.flatten(), last.flatten()):
        assert torch.equal(found[:26], torch.zeros_like(found[:26]))
        torch.testing.assert_close(found[26:], grad[26:], equal_nan=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.memory != "strided"], ids=case_id)
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_memory_order_follows_x(provider, dtype, case):
    inputs = make_inputs(case, dtype, provider.device)
    with provider.force():
        ours = inputs.results()
    assert ours["output y"].stride() == torch.empty_like(inputs.x).stride()
    assert ours["output grad_x"].stride() == torch.empty_like(inputs.x).stride()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_all_and_none_masked(provider, dtype, act):
    inputs = make_inputs(Case((2, 60, 37), act), dtype, provider.device)
    zeros, ones = torch.zeros_like(inputs.mask), torch.ones_like(inputs.mask)
    with provider.force():
        assert not masked_act(inputs.x, zeros, act=act).any()
        grad_x, sums = BACKWARD(inputs.grad, inputs.x, zeros, -1, act, True)
        y = masked_act(inputs.x, ones, act="relu")
    assert not grad_x.any()
    # The gradient of the mask does not vanish with it.
    assert sums.abs().min() > 0
    assert torch.equal(y, inputs.x.relu())


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_views_give_what_their_copies_give(provider, dtype):
    torch.manual_seed(0)
    base = torch.randn(3, 9, 8, 6, device=provider.device)
    mask = torch.rand(20, device=provider.device)[1:17:2]
    views = [base[:, 1:], base[1:, 1:, ::2], base[:, 1:].transpose(2, 3), base[:, 1:].flip(0).expand(3, 8, 8, 6)]
    with provider.force():
        for x in views:
            y = masked_act(x, mask, act="silu", channel_dim=1)
            assert torch.equal(y, masked_act(x.contiguous(), mask.clone(), act="silu", channel_dim=1))
            # The gradient of a sum is one number, expanded.
            leaf = x.detach().requires_grad_()
            masked_act(leaf, mask, act="relu", channel_dim=1).sum().backward()
            torch.testing.assert_close(leaf.grad, mask.view(-1, 1, 1) * (x > 0))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(memory):
    inputs = make_inputs(Case((3, 48, 40, 40), channel_dim=1, memory=memory), torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(inputs.results())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_same_call_same_bits(provider, dtype):
    inputs = make_inputs(Case((2, 30, 30, 24), "silu"), dtype, provider.device)
    with provider.force():
        first, second = inputs.results(), inputs.results()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act, channel_dim):
    inputs = make_inputs(Case((2, 3, 4, 3), act, channel_dim), torch.float32)
    # Away from the corner of relu.
    x = torch.where(inputs.x.abs() < 0.1, 1.0, inputs.x).double().requires_grad_()
    mask = inputs.mask.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, mask: masked_act(x, mask, act=act, channel_dim=channel_dim), (x, mask), eps=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_opcheck(provider, dtype, memory):
    inputs = make_inputs(Case((2, 3, 4, 5), "silu", 1, memory), dtype, provider.device)
    x, mask = inputs.x.detach().requires_grad_(), inputs.mask.detach().requires_grad_()
    with provider.force():
        torch.library.opcheck(FORWARD, (x, mask, 1, "silu"))
        for need_grad_x in (True, False):
            torch.library.opcheck(BACKWARD, (inputs.grad, inputs.x, inputs.mask, 1, "gelu", need_grad_x))


def test_compiles_into_one_graph():
    inputs = make_inputs(Case((2, 5, 6)), torch.float32)

    def layer(x, mask):
        return masked_act(x, mask, act="gelu").mean(1)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    mask = inputs.mask.requires_grad_()
    assert torch.equal(compiled(inputs.x, mask), layer(inputs.x, mask))
    assert torch.equal(*(torch.autograd.grad(f(inputs.x, mask).sum(), mask)[0] for f in (compiled, layer)))
    with torch.no_grad():
        assert torch.equal(compiled(inputs.x, mask), layer(inputs.x, mask))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_saves_only_x_and_mask(act):
    inputs = make_inputs(Case((2, 6, 9)), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        masked_act(inputs.x.requires_grad_(), inputs.mask.requires_grad_(), act=act)
    assert saved == [inputs.x.data_ptr(), inputs.mask.data_ptr()]


@pytest.mark.parametrize("index", range(2))
def test_gradients_one_at_a_time(index):
    # Each is right also where the other is not asked for.
    inputs = make_inputs(Case((2, 6, 5)), torch.float32)
    tensors = [inputs.x.detach(), inputs.mask.detach()]
    exact = list(inputs.plain(torch.float64).values())[1 + index]
    tensors[index].requires_grad_()
    masked_act(*tensors, act="gelu").backward(inputs.grad)
    torch.testing.assert_close(tensors[index].grad.double(), exact, rtol=1e-5, atol=1e-5)
    assert tensors[1 - index].grad is None


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_backward_op_gives_sums_of_each_sample(provider, dtype, act):
    inputs = make_inputs(Case((3, 5, 4), act), dtype, provider.device)
    with provider.force():
        grad_x, sums = BACKWARD(inputs.grad, inputs.x, inputs.mask, -1, act, False)
    assert grad_x.numel() == 0
    torch.testing.assert_close(sums, (inputs.grad * PLAIN[act](inputs.x)).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [torch.square, torch.clone], ids=["of the gradient too", "of a constant gradient"])
def test_second_derivative_is_an_error_not_a_zero(last):
    inputs = make_inputs(Case((2, 3, 4)), torch.float32)
    x, mask = inputs.x.requires_grad_(), inputs.mask.requires_grad_()
    y = masked_act(x, mask, act="gelu")
    gradients = torch.autograd.grad(last(y).sum(), (x, mask), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="no second derivative"):
            (gradient.sum() + mask.sum()).backward(retain_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "elu"}, "act must be one of gelu, gelu_tanh, relu, silu, quick_gelu"),
        ({"channel_dim": 2}, "channel_dim must be 1 or -1"),
        ({"x": torch.randn(4)}, "samples and channels"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "float32, bfloat16 or float16"),
        ({"mask": torch.ones(3)}, r"mask must be torch.float32 of shape \(4,\)"),
        ({"mask": torch.ones(4, dtype=torch.float64)}, "mask must be torch.float32"),
        ({"mask": torch.ones(4, device="meta")}, "mask must be .* on cpu"),
        ({"channel_dim": 1}, r"mask must be .* \(3,\)"),
    ],
)
def test_wrong_arguments_name_what_is_wrong(change, message):
    arguments = {"x": torch.randn(2, 3, 4), "mask": torch.ones(4), "act": "gelu"}
    with pytest.raises(BackendError, match=message):
        masked_act(**(arguments | change))


def test_gradient_that_does_not_fit_is_an_error():
    with pytest.raises(BackendError, match="must be like x"):
        BACKWARD(torch.ones(2, 3, 1), torch.ones(2, 3, 4), torch.ones(4), -1, "gelu", True)


def test_native_op_stays_inside_its_memory():
    # Called without the Python checks: an error, and not memory of others.
    x, mask = torch.randn(2, 3, 4), torch.ones(4)
    with force_backend("cpu"):
        masked_act(x, mask, act="relu")
    native, backward = (getattr(torch.ops.mnp_fast_cpu, name).default for name in ("masked_act", "masked_act_backward"))
    for arguments, message in (
        ((x, mask, 2, 4, 4, True, 0, 0), "numbers instead of"),
        ((torch.randn(2, 3, 8)[..., ::2], mask, 2, 4, 3, True, 0, 0), "not dense"),
        ((x, mask[:3], 2, 4, 3, True, 0, 0), "mask has"),
        ((x, mask, 2, 4, 3, True, 5, 0), "no activation"),
        ((x, mask, 2, 4, 3, True, 0, 9), "instruction set"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native(*arguments)
    with pytest.raises(RuntimeError, match="grad has"):
        backward(x[:1], x, mask, 2, 4, 3, True, 0, True, 0)
