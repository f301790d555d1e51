"""masked_affine: every provider against plain torch in float64, and the promises of the op's own docstring."""

from __future__ import annotations

import pytest
import torch
from affine_cases import (
    ALL_PROVIDERS,
    CASES,
    FLOAT32_PROVIDERS,
    TOLERANCE,
    Case,
    case_id,
    make_inputs,
)
from channel_cases import assert_ratio

from mnp_fast.errors import BackendError
from mnp_fast.ops import force_backend, force_cpu_isa, masked_affine, op_masked_affine
from mnp_fast.ops.cpu_backend import usable_isas
from mnp_fast.ops.layout import dense

FORWARD = torch.ops.mnp_fast.masked_affine.default
BACKWARD = torch.ops.mnp_fast.masked_affine_backward.default


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
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_all_masked_leaves_exactly_the_shift(provider, dtype, memory):
    inputs = make_inputs(Case((2, 19, 5, 5), residual=True, act="relu", memory=memory), dtype, provider.device)
    _, scale, center, shift = inputs.vectors
    with provider.force():
        y = masked_affine(inputs.x, torch.zeros_like(scale), scale, center, shift)
        added = masked_affine(inputs.x, torch.zeros_like(scale), scale, center, shift, inputs.residual, act="relu")
    spread = shift.view(1, -1, 1, 1)
    assert torch.equal(y, spread.to(dtype).expand_as(y))
    assert torch.equal(added, (spread + inputs.residual.float()).relu().to(dtype))


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_none_masked_rounds_once(provider, dtype, memory):
    # One product and one rounding: the mathematics leaves one answer, ties to even included.
    inputs = make_inputs(Case((2, 20, 7, 5), memory=memory), dtype, provider.device)
    one = torch.ones(20, device=provider.device)
    zero = torch.zeros_like(one)
    scale = one + torch.arange(20, device=provider.device) * 2.0**-9
    with provider.force():
        y = masked_affine(inputs.x, one, scale, zero, zero)
    assert torch.equal(y, (inputs.x.float() * scale.view(-1, 1, 1)).to(dtype))


@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_not_finite_numbers_pass(provider, dtype):
    x = torch.randn(1, 2, 40, device=provider.device).to(dtype)
    x[0, 0, ::7] = float("nan")
    x[0, 1, ::7] = float("inf")
    one = torch.ones(2, device=provider.device)
    zero = torch.zeros_like(one)
    with provider.force():
        y = masked_affine(x, one, one, zero, zero, act="relu")
        grad_x = BACKWARD(torch.ones_like(x), x, None, one, one, zero, zero, 1, "relu", True, False)[0]
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.isinf(), x.isinf())
    # All bits of this one are set: rounding it to a narrow dtype as if it were a number would give -0.
    full = torch.tensor([0x7FFFFFFF], dtype=torch.int32, device=provider.device).view(torch.float32).expand(2)
    with provider.force():
        assert masked_affine(torch.ones_like(x), one, full, zero, zero, act="relu").isnan().all()
    # As torch's own relu: what is not a number lets the gradient through.
    assert torch.equal(grad_x, ((x > 0) | x.isnan()).to(dtype))


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_views_give_what_their_copies_give(provider, dtype):
    torch.manual_seed(0)
    base = torch.randn(3, 9, 8, 6, device=provider.device)
    flat = torch.randn(5 * 8, device=provider.device)
    vectors = [flat[1 + 8 * i : 9 + 8 * i] for i in range(4)]
    views = [base[:, 1:], base[1:, 1:, ::2], base[:, 1:].transpose(2, 3), base[:, 1:].flip(0).expand(3, 8, 8, 6)]
    with provider.force():
        for x in views:
            y = masked_affine(x, *vectors, x, act="relu")
            copies = masked_affine(x.contiguous(), *[v.clone() for v in vectors], x.contiguous(), act="relu")
            assert torch.equal(y, copies)
            # The gradient of a sum is one number, expanded.
            leaf = x.detach().requires_grad_()
            masked_affine(leaf, *vectors).sum().backward()
            torch.testing.assert_close(leaf.grad, (vectors[0] * vectors[1]).view(-1, 1, 1).expand_as(leaf))


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


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_same_call_same_bits(provider, dtype):
    inputs = make_inputs(
        Case((2, 24, 30, 30), act="relu", residual=True, memory="channels_last"), dtype, provider.device
    )
    with provider.force():
        first, second = inputs.results(), inputs.results()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("case", [c for c in CASES if len(c.shape) < 5 and c.shape[0] < 4], ids=case_id)
def test_gradcheck(case):
    if case.shape[-1] > 50 or case.shape[-2] > 20 or case.shape[1] > 20:
        case = case._replace(shape=(2, 3, 4) if case.channel_dim == -1 else (2, 3, 4, 3))
    inputs = make_inputs(case, torch.float32)
    tensors = [t.double().detach().requires_grad_() for t in (inputs.x, *inputs.vectors)]
    if inputs.residual is not None:
        tensors.append(inputs.residual.double().detach().requires_grad_())

    def op(x, mask, scale, center, shift, residual=None):
        return masked_affine(x, mask, scale, center, shift, residual, channel_dim=case.channel_dim, act=case.act)

    assert torch.autograd.gradcheck(op, tensors, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_opcheck(provider, dtype, memory):
    inputs = make_inputs(Case((2, 3, 4, 5), act="relu", residual=True, memory=memory), dtype, provider.device)
    x = inputs.x.detach().requires_grad_()
    vectors = [v.detach().requires_grad_() for v in inputs.vectors]
    with provider.force():
        torch.library.opcheck(FORWARD, (x, *vectors, inputs.residual, 1, "relu"))
        torch.library.opcheck(FORWARD, (x, *vectors, None, 1, "none"))
        fixed = (inputs.grad, inputs.x)
        torch.library.opcheck(BACKWARD, (*fixed, inputs.x, *inputs.vectors, 1, "relu", True, True))
        torch.library.opcheck(BACKWARD, (*fixed, None, *inputs.vectors, 1, "none", False, False))


def test_compiles_into_one_graph():
    inputs = make_inputs(Case((2, 6, 5, 5), residual=True), torch.float32)

    def layer(x, mask, scale, center, shift, residual):
        return masked_affine(x, mask, scale, center, shift, residual, act="relu").mean((2, 3))

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
            masked_affine(inputs.x, mask, *inputs.vectors[1:], residual, act=act)
        return [size // inputs.x.numel() for size in sizes if size >= inputs.x.numel()]

    assert saved(None, "none") == saved(None, "relu") == saved(inputs.residual, "none") == [1]
    assert saved(inputs.residual, "relu") == [1, 1]


@pytest.mark.parametrize("index", range(6))
def test_gradients_one_at_a_time(index):
    # Each is right also where no other is asked for.
    inputs = make_inputs(Case((2, 6, 5, 3), act="relu", residual=True), torch.float32)
    tensors = [t.detach() for t in (inputs.x, *inputs.vectors, inputs.residual)]
    everything = list(inputs.plain(torch.float64).values())[1:]
    order = [0, 2, 3, 4, 5, 1]
    tensors[index].requires_grad_()
    masked_affine(*tensors, act="relu").backward(inputs.grad)
    torch.testing.assert_close(tensors[index].grad.double(), everything[order[index]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("provider", "dtype"), FLOAT32_PROVIDERS)
def test_backward_op_gives_sums_of_each_sample(provider, dtype):
    inputs = make_inputs(Case((3, 5, 4, 4), act="relu"), dtype, provider.device)
    mask, scale, center, shift = inputs.vectors
    with provider.force():
        _, _, _, sum_gx = BACKWARD(inputs.grad, inputs.x, None, mask, scale, center, shift, 1, "relu", False, False)
    for sample in range(3):
        leaf = mask.detach().requires_grad_()
        x = inputs.x[sample : sample + 1]
        y = leaf.view(-1, 1, 1) * scale.view(-1, 1, 1) * (x - center.view(-1, 1, 1)) + shift.view(-1, 1, 1)
        (gradient,) = torch.autograd.grad(y.relu(), leaf, inputs.grad[sample : sample + 1])
        torch.testing.assert_close(scale * sum_gx[sample], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_residual", [True, False])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize(("shape", "memory"), [((3, 32, 7, 5), "channels_last"), ((2, 5, 6, 3), "channels_last"),
                                               ((2, 48, 4, 4), "contiguous"), ((0, 16, 3, 3), "channels_last"),
                                               ((3, 16, 70, 80), "channels_last")])  # fmt: skip
@pytest.mark.parametrize(("provider", "dtype"), ALL_PROVIDERS)
def test_a_gradient_that_may_be_written_over(provider, dtype, shape, memory, act, need_residual):
    inputs = make_inputs(Case(shape, act=act, residual=need_residual, memory=memory), dtype, provider.device)
    with provider.force():
        y = op_masked_affine.run(inputs.x, *inputs.vectors, inputs.residual, 1, act)
        kept, sign = op_masked_affine.run_keeping_sign(inputs.x, *inputs.vectors, inputs.residual, act)
        assert torch.equal(kept, y)
        through = need_residual and act == "relu"
        expected = op_masked_affine.run_backward(
            inputs.grad, inputs.x, y if through else None, *inputs.vectors, 1, act, True, through
        )
        bits = provider.backend == "cpu" and through and shape[1] % 16 == 0
        bits = bits and dense(inputs.x, 1)[1].channels_last
        assert sign is None if not through else (sign.dtype == torch.uint8) == bits
        for over in (False, True):
            grad = inputs.grad.clone()
            given = op_masked_affine.run_backward_(grad, inputs.x, sign, *inputs.vectors, act, True, through, over)
            for a, b in zip(given, expected, strict=True):
                assert torch.equal(a, b)
            written = provider.backend == "cpu" and over and grad.stride() == inputs.x.stride()
            assert torch.equal(grad, (given[1] if through else given[0]) if written else inputs.grad)


def test_signs_are_kept_of_what_the_relu_lets_through():
    x = torch.tensor([1.0, -1.0, 0.0, float("nan"), -0.0, 1e-30, float("inf"), -float("inf")]).repeat(4)
    x = x.view(1, 32, 1, 1).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(32), torch.zeros(32)
    for isa in usable_isas():
        with force_backend("cpu"), force_cpu_isa(isa):
            _, sign = op_masked_affine.run_keeping_sign(x, ones, ones, zeros, zeros, torch.zeros_like(x), "relu")
            found = op_masked_affine.run_backward_(
                torch.ones_like(x), x, sign, ones, ones, zeros, zeros, "relu", True, True, False
            )
        assert sign.tolist() == [0b01101001] * 4
        assert found[1].flatten().tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0] * 4


@pytest.mark.parametrize("last", [torch.square, torch.clone], ids=["of the gradient too", "of a constant gradient"])
def test_second_derivative_is_an_error_not_a_zero(last):
    inputs = make_inputs(Case((2, 3, 4)), torch.float32)
    x, mask = inputs.x.requires_grad_(), inputs.vectors[0].requires_grad_()
    y = masked_affine(x, mask, *inputs.vectors[1:])
    gradients = torch.autograd.grad(last(y).sum(), (x, mask), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="no second derivative"):
            (gradient.sum() + mask.sum()).backward(retain_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "gelu"}, "act must be one of none, relu"),
        ({"channel_dim": 2}, "channel_dim must be 1 or -1"),
        ({"x": torch.randn(4)}, "samples and channels"),
        ({"x": torch.ones(2, 4, 3, dtype=torch.int64)}, "float32, bfloat16 or float16"),
        ({"mask": torch.ones(3)}, r"mask must be torch.float32 of shape \(4,\)"),
        ({"scale": torch.ones(4, dtype=torch.float64)}, "scale must be torch.float32"),
        ({"center": torch.ones(4, device="meta")}, "center must be .* on cpu"),
        ({"shift": torch.ones(1, 4)}, "shift must be"),
        ({"residual": torch.ones(2, 4, 1)}, "must be like x"),
        ({"residual": torch.ones(2, 4, 3, dtype=torch.bfloat16)}, "must be like x"),
    ],
)
def test_wrong_arguments_name_what_is_wrong(change, message):
    arguments = {"x": torch.randn(2, 4, 3), "residual": None}
    arguments |= {name: torch.ones(4) for name in ("mask", "scale", "center", "shift")}
    with pytest.raises(BackendError, match=message):
        masked_affine(**(arguments | change))


def test_native_op_stays_inside_its_memory():
    # Called without the Python checks: an error, and not memory of others.
    with force_backend("cpu"):
        masked_affine(torch.randn(2, 4, 3), *[torch.ones(4)] * 4)
    native = torch.ops.mnp_fast_cpu.masked_affine.default
    ones = [torch.ones(4)] * 4
    with pytest.raises(RuntimeError, match="numbers instead of"):
        native(torch.randn(2, 4, 3), *ones, None, 2, 4, 4, False, False, 0)
    with pytest.raises(RuntimeError, match="not dense"):
        native(torch.randn(2, 4, 6)[:, :, ::2], *ones, None, 2, 4, 3, False, False, 0)
    with pytest.raises(RuntimeError, match="mask has"):
        native(torch.randn(2, 4, 3), torch.ones(3), *ones[1:], None, 2, 4, 3, False, False, 0)
    with pytest.raises(RuntimeError, match="instruction set"):
        native(torch.randn(2, 4, 3), *ones, None, 2, 4, 3, False, False, 9)
