"""masked_batch_norm: every provider against plain torch in float64, and the promises of the op's own docstring."""

from __future__ import annotations

import pytest
import torch
from affine_cases import TOLERANCE, Case, case_id
from batch_norm_cases import ALL_PROVIDERS, CASES, EPS, FLOAT32_PROVIDERS, make_inputs
from channel_cases import assert_ratio

from mnp_fast.errors import BackendError
from mnp_fast.ops import force_backend, masked_batch_norm

FORWARD = torch.ops.mnp_fast.masked_batch_norm.default
BACKWARD = torch.ops.mnp_fast.masked_batch_norm_backward.default


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_matches_plain_torch_in_float64(provider, dtype, case):
    inputs = make_inputs(case, dtype, provider.device)
    with provider.force():
        ours = inputs.results()
    exact = inputs.exact()
    plain = None if dtype in TOLERANCE else inputs.plain()
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == (dtype if name.startswith("output") else torch.float32), name
        if plain is None or name.startswith("sum"):
            # Sums are in float32 whatever the dtype of x.
            rtol, atol = TOLERANCE[torch.float32][name.split()[0]]
            torch.testing.assert_close(
                value.double(), exact[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert_ratio(name, value, exact[name], plain[name])


@pytest.mark.parametrize("case", [c for c in CASES if c.memory != "strided"], ids=case_id)
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_memory_order_follows_x(provider, dtype, case):
    inputs = make_inputs(case, dtype, provider.device)
    with provider.force():
        ours = inputs.results()
    assert ours["output y"].stride() == torch.empty_like(inputs.x).stride()
    assert ours["output grad_x"].stride() == torch.empty_like(inputs.x).stride()


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [7, 60])
@pytest.mark.parametrize("first", ["alike", "apart"])
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_statistics_of_a_large_mean_and_a_small_variance(provider, dtype, first, side, memory):
    # Sums of x and x^2 in float32 would leave nothing of these variances.
    generator = torch.Generator().manual_seed(0)
    x = 1000 + 0.1 * torch.randn(2, 24, side, side, generator=generator)
    if first == "apart":
        # Where a kernel may take the number from that it measures differences.
        x[:, :, 0, :4] = 990.0
    x = x.to(provider.device)
    if memory == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    one = torch.ones(24, device=provider.device)
    with provider.force():
        y, mean, rstd = FORWARD(x, one, one, one, None, 1e-5, "none")
    variance, exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    # The mean as near as float32 comes to it.
    assert (mean.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * 1024
    torch.testing.assert_close(rstd.double(), 1 / (variance + 1e-5).sqrt(), rtol=1e-5, atol=0)
    # Half a unit in the last place of the mean, of a shift as large, and nothing that grows with the sums.
    bound = 2 * torch.finfo(dtype).eps * 1024 * rstd.double().max()
    xhat = (x.double() - exact.view(-1, 1, 1)) / (variance + 1e-5).sqrt().view(-1, 1, 1)
    assert (y.double() - 1 - xhat).abs().max() <= bound


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_all_masked_leaves_exactly_the_bias(provider, dtype, memory):
    inputs = make_inputs(Case((2, 19, 5, 5), residual=True, memory=memory), dtype, provider.device)
    _, weight, bias = inputs.vectors
    zero = torch.zeros_like(weight)
    with provider.force():
        y = masked_batch_norm(inputs.x, zero, weight, bias, act="relu")
        grad_x = BACKWARD(inputs.grad, inputs.x, None, zero, weight, bias, zero, zero + 1, "relu", True, False)[0]
    assert torch.equal(y, bias.relu().to(dtype).view(1, -1, 1, 1).expand_as(y))
    assert not grad_x.any()


@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_constant_channel_is_the_bias(provider, dtype):
    x = torch.full((3, 5, 4, 4), 7.0, device=provider.device).to(dtype)
    one, bias = torch.ones(5, device=provider.device), torch.arange(5.0, device=provider.device)
    with provider.force():
        y, mean, rstd = FORWARD(x, one, one, bias, None, 1e-5, "none")
    assert torch.equal(mean, 7 * one)
    torch.testing.assert_close(rstd, one / 1e-5**0.5)
    torch.testing.assert_close(y.float(), bias.view(1, -1, 1, 1).expand(y.shape), rtol=0, atol=3e-4)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_not_finite_numbers_stay_in_their_channel(provider, dtype, memory):
    inputs = make_inputs(Case((2, 20, 7, 5), memory=memory), dtype, provider.device)
    x = inputs.x.clone()
    x[1, 3, 6, 4] = float("nan")
    x[0, 18, 0, 0] = float("inf")
    one = torch.ones(20, device=provider.device)
    with provider.force():
        y, mean, rstd = FORWARD(x, one, one, one, None, EPS, "relu")
        clean, _, _ = FORWARD(inputs.x, one, one, one, None, EPS, "relu")
        grad_x = BACKWARD(inputs.grad, x, None, one, one, one, mean, rstd, "relu", True, False)[0]
    finite = [c for c in range(20) if c not in (3, 18)]
    for broken in (3, 18):
        assert y[:, broken].isnan().any()
        assert grad_x[:, broken].isnan().any()
    assert y[:, 3].isnan().all()
    assert torch.equal(y[:, finite], clean[:, finite])
    assert grad_x[:, finite].isfinite().all()


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_views_give_what_their_copies_give(provider, dtype):
    torch.manual_seed(0)
    base = torch.randn(3, 9, 8, 6, device=provider.device)
    flat = torch.randn(3 * 8 + 1, device=provider.device)
    vectors = [flat[1 + 8 * i : 9 + 8 * i] for i in range(3)]
    views = [base[:, 1:], base[1:, 1:, ::2], base[:, 1:].transpose(2, 3), base[:, 1:].flip(0).expand(3, 8, 8, 6)]
    with provider.force():
        for x in views:
            y = masked_batch_norm(x, *vectors, x, act="relu")
            copies = masked_batch_norm(x.contiguous(), *[v.clone() for v in vectors], x.contiguous(), act="relu")
            assert torch.equal(y, copies)
            # The gradient of a sum is one number, expanded; what is added to every number of a channel is taken away.
            leaf = x.detach().requires_grad_()
            masked_batch_norm(leaf, *vectors).sum().backward()
            torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(memory):
    inputs = make_inputs(Case((3, 48, 40, 40), act="relu", residual=True, memory=memory), torch.float32)
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


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_same_call_same_bits(provider, dtype, memory):
    inputs = make_inputs(Case((2, 24, 30, 30), act="relu", residual=True, memory=memory), dtype, provider.device)
    with provider.force():
        first, second = inputs.results(), inputs.results()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "strided"])
def test_gradcheck_in_float64(act, residual, memory):
    inputs = make_inputs(Case((3, 4, 2, 3), act=act, residual=residual, memory=memory), torch.float64, seed=1)
    tensors = [inputs.x, *[v.double() for v in inputs.vectors], *([inputs.residual] if residual else [])]
    tensors = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: masked_batch_norm(*t, act=act), tensors)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_opcheck(provider, dtype, memory):
    inputs = make_inputs(Case((2, 3, 4, 5), act="relu", residual=True, memory=memory), dtype, provider.device)
    x = inputs.x.detach().requires_grad_()
    vectors = [v.detach().requires_grad_() for v in inputs.vectors]
    with provider.force():
        torch.library.opcheck(FORWARD, (x, *vectors, inputs.residual, EPS, "relu"))
        torch.library.opcheck(FORWARD, (x, *vectors, None, EPS, "none"))
        torch.library.opcheck(FORWARD, (x[:0], *vectors, None, EPS, "none"))
        fixed = (inputs.grad, inputs.x)
        statistics = (torch.zeros_like(inputs.vectors[0]), torch.ones_like(inputs.vectors[0]))
        torch.library.opcheck(BACKWARD, (*fixed, inputs.x, *inputs.vectors, *statistics, "relu", True, True))
        torch.library.opcheck(BACKWARD, (*fixed, None, *inputs.vectors, *statistics, "none", False, False))


def test_compiles_into_one_graph():
    inputs = make_inputs(Case((2, 6, 5, 5), residual=True), torch.float32)

    def layer(x, mask, weight, bias, residual):
        return masked_batch_norm(x, mask, weight, bias, residual, act="relu").mean((2, 3))

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    mask = inputs.vectors[0].requires_grad_()
    arguments = (inputs.x, mask, *inputs.vectors[1:], inputs.residual)
    assert torch.equal(compiled(*arguments), layer(*arguments))
    assert torch.equal(*(torch.autograd.grad(f(*arguments).sum(), mask)[0] for f in (compiled, layer)))
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), layer(*arguments))


def test_saves_only_what_backward_needs():
    inputs = make_inputs(Case((2, 6, 9, 9), residual=True), torch.float32)
    mask = inputs.vectors[0].requires_grad_()

    def saved(residual, act):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            masked_batch_norm(inputs.x, mask, *inputs.vectors[1:], residual, act=act)
        return [size // inputs.x.numel() for size in sizes if size >= inputs.x.numel()]

    assert saved(None, "none") == saved(None, "relu") == saved(inputs.residual, "none") == [1]
    assert saved(inputs.residual, "relu") == [1, 1]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["x", "mask", "weight", "bias", "residual"])
def test_gradients_one_at_a_time(name, residual):
    # Each is right also where no other is asked for.
    if name == "residual" and not residual:
        pytest.skip("there is none")
    inputs = make_inputs(Case((2, 6, 5, 3), act="relu", residual=residual), torch.float32)
    arguments = dict(zip(("x", "mask", "weight", "bias"), (inputs.x, *inputs.vectors), strict=True))
    arguments["residual"] = inputs.residual
    arguments = {key: None if t is None else t.detach() for key, t in arguments.items()}
    arguments[name].requires_grad_()
    masked_batch_norm(**arguments, eps=EPS, act="relu").backward(inputs.grad)
    exact = inputs.exact()
    expected = exact[f"output grad_{name}"] if name in ("x", "residual") else exact[f"sum grad_{name}"]
    torch.testing.assert_close(arguments[name].grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_backward_op_gives_sums_of_each_sample(provider, dtype, memory):
    inputs = make_inputs(Case((3, 5, 4, 4), act="relu", memory=memory), dtype, provider.device)
    with provider.force():
        _, mean, rstd = FORWARD(inputs.x, *inputs.vectors, None, EPS, "relu")
        tensors = (inputs.grad, inputs.x, None, *inputs.vectors, mean, rstd)
        _, _, sum_g, sum_gx = BACKWARD(*tensors, "relu", False, False)
    mask, weight, bias = (v.view(-1, 1, 1) for v in inputs.vectors)
    xhat = (inputs.x - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1)
    g = inputs.grad * (mask * weight * xhat + bias > 0)
    torch.testing.assert_close(sum_g, g.sum((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum_gx, (g * xhat).sum((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_empty_input_gives_empty_output_and_zero_gradients(provider, dtype, shape):
    x = torch.randn(shape, device=provider.device).to(dtype).requires_grad_()
    vectors = [torch.ones(4, device=provider.device, requires_grad=True) for _ in range(3)]
    with provider.force():
        y = masked_batch_norm(x, *vectors, x, act="relu")
        y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert all(torch.equal(v.grad, torch.zeros_like(v)) for v in vectors)


def test_statistics_carry_no_gradient():
    inputs = make_inputs(Case((2, 3, 4)), torch.float32)
    y, mean, rstd = FORWARD(inputs.x, inputs.vectors[0].requires_grad_(), *inputs.vectors[1:], None, EPS, "none")
    assert [t.requires_grad for t in (y, mean, rstd)] == [True, False, False]


@pytest.mark.parametrize("last", [torch.square, torch.clone], ids=["of the gradient too", "of a constant gradient"])
def test_second_derivative_is_an_error_not_a_zero(last):
    inputs = make_inputs(Case((2, 3, 4)), torch.float32)
    x, mask = inputs.x.requires_grad_(), inputs.vectors[0].requires_grad_()
    y = masked_batch_norm(x, mask, *inputs.vectors[1:])
    gradients = torch.autograd.grad(last(y).sum(), (x, mask), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="no second derivative"):
            (gradient.sum() + mask.sum()).backward(retain_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "gelu"}, "act must be one of none, relu"),
        ({"x": torch.randn(4)}, "samples and channels"),
        ({"x": torch.randn(1, 4)}, "two samples or more, or use masked_affine"),
        ({"x": torch.randn(1, 4, 1, 1)}, "one value a channel"),
        ({"x": torch.ones(2, 4, 3, dtype=torch.int64)}, "float32, bfloat16 or float16"),
        ({"mask": torch.ones(3)}, r"mask must be torch.float32 of shape \(4,\)"),
        ({"weight": torch.ones(4, dtype=torch.float64)}, "weight must be torch.float32"),
        ({"bias": torch.ones(4, device="meta")}, "bias must be .* on cpu"),
        ({"residual": torch.ones(2, 4, 1)}, "must be like x"),
        ({"residual": torch.ones(2, 4, 3, dtype=torch.bfloat16)}, "must be like x"),
    ],
)
def test_wrong_arguments_name_what_is_wrong(change, message):
    arguments = {"x": torch.randn(2, 4, 3)} | {name: torch.ones(4) for name in ("mask", "weight", "bias")}
    with pytest.raises(BackendError, match=message):
        masked_batch_norm(**(arguments | change))


def test_native_op_stays_inside_its_memory():
    # Called without the Python checks: an error, and not memory of others.
    ones = [torch.ones(4)] * 3
    with force_backend("cpu"):
        masked_batch_norm(torch.randn(2, 4, 3), *ones)
    forward = torch.ops.mnp_fast_cpu.masked_batch_norm.default
    backward = torch.ops.mnp_fast_cpu.masked_batch_norm_backward.default
    x, options = torch.randn(2, 4, 3), (False, 1e-5, False, 0)
    with pytest.raises(RuntimeError, match="numbers instead of"):
        forward(x, *ones, None, 2, 4, 4, *options)
    with pytest.raises(RuntimeError, match="not dense"):
        forward(torch.randn(2, 4, 6)[:, :, ::2], *ones, None, 2, 4, 3, *options)
    with pytest.raises(RuntimeError, match="weight has"):
        forward(x, ones[0], torch.ones(3), ones[0], None, 2, 4, 3, *options)
    with pytest.raises(RuntimeError, match="is empty"):
        forward(x[:0], *ones, None, 0, 4, 3, *options)
    with pytest.raises(RuntimeError, match="rstd has"):
        backward(x, x, None, *ones, ones[0], torch.ones(5), 2, 4, 3, False, False, True, False, 0)
    with pytest.raises(RuntimeError, match="instruction set"):
        forward(x, *ones, None, 2, 4, 3, False, 1e-5, False, 9)
