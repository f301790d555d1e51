"""masked: numbers against pruned copies and plain torch, gradients, statistics; the model comes back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import ARCHITECTURES, SMALL, BareNorm, Stranger, logits, make, narrow_resnet18, randomize, snapshot
from torch import Tensor, nn

from mnp_fast.errors import ConfigError
from mnp_fast.masked import masked, prune_
from mnp_fast.sites import find_sites, total_neurons


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest value: what float32 leaves over fifty layers."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), f"largest difference {error}"


def stranger(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomize(Stranger()).to(dtype).eval(), torch.randn(3, 3, 8, 8, dtype=dtype)


def keep_most(sites, seed: int = 0) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.rand(total_neurons(sites), generator=torch.Generator().manual_seed(seed)) > 0.1


# ---------------------------------------------------------------- values
@pytest.mark.parametrize("name", [*ARCHITECTURES, *SMALL])
@torch.no_grad()
def test_architecture(name: str) -> None:
    model, example = make({**ARCHITECTURES, **SMALL}[name])
    sites = find_sites(model, example)
    before = snapshot(model)
    plain = logits(model(example))
    keep = keep_most(sites)
    with masked(model, sites, torch.ones(len(keep))) as inside:
        assert inside is model
        close(logits(model(example)), plain)
    with masked(model, sites, keep.float()):
        hard = logits(model(example))
    assert snapshot(model) == before
    assert torch.equal(logits(model(example)), plain)
    prune_(model, sites, keep)
    pruned = logits(model(example))
    close(hard, pruned)
    assert (hard - plain).abs().max() > 1e-2 * plain.abs().max()


@torch.no_grad()
def test_each_site_of_a_strangers_module() -> None:
    model, example = stranger()
    sites = find_sites(model, example)
    plain = model(example)
    assert {name for name, _, _ in Stranger.found} == {site.path or site.parameter for site in sites}
    for site in sites:
        keep = torch.ones(total_neurons(sites), dtype=torch.bool)
        keep[site.offset : site.offset + site.neurons : 2] = False
        with masked(model, sites, keep.float()):
            hard = model(example)
        pruned = copy.deepcopy(model)
        prune_(pruned, sites, keep)
        close(hard, pruned(example), 2e-6)
        assert (hard - plain).abs().max() > 1e-4, f"the mask of {site.path} has no effect"


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_partial_masks_on_convolutions(groups: int) -> None:
    for conv in (nn.Conv2d(4, 8, 3, groups=groups), nn.ConvTranspose2d(4, 8, 3, groups=groups, bias=False)):
        model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(2))
        example = torch.randn(2, 4, 5, 5)
        model(example)
        sites = find_sites(model, example)
        mask = torch.rand(8)
        bias = torch.zeros(8) if conv.bias is None else conv.bias
        output = (conv(example) - bias[:, None, None]) * mask[:, None, None] + bias[:, None, None]
        with masked(model, sites, mask):
            close(model(example), model[2](output.flatten(1)))
            close(conv(example[0]), output[0])  # no batch dimension


@torch.no_grad()
def test_shared_weight_is_masked_in_both_modules() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    model[2].weight = model[0].weight
    example = torch.rand(2, 3, 2, 2)
    sites = find_sites(model, example)
    keep = torch.tensor([True, False, True])
    with masked(model, sites, keep.float()):
        hard = model(example)
    prune_(model, sites, keep)
    close(hard, model(example))


@torch.no_grad()
def test_the_mask_may_change_between_forwards() -> None:
    model, example = stranger()
    sites = find_sites(model, example)
    mask = torch.ones(total_neurons(sites))
    with masked(model, sites, mask):
        first = model(example)
        mask.mul_(0.5)
        second = model(example)
    with masked(model, sites, torch.full_like(mask, 0.5)):
        assert torch.equal(second, model(example))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_constants_are_folded_on_entry() -> None:
    model, example = make(SMALL["elu vgg"])
    sites = find_sites(model, example)
    with masked(model, sites, torch.ones(total_neurons(sites))):
        before = model(example)
        model.body[1].running_mean += 1
        assert torch.equal(before, model(example))
        model.body[1].running_mean -= 1


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_gradient_against_finite_differences(batch_statistics: bool) -> None:
    model, example = stranger(torch.float64)
    sites = find_sites(model, example)
    mask = torch.randint(32, 65, (total_neurons(sites),)) / 64  # a step of 2^-18 is exact in float32
    step = 2**-18
    target = torch.randn(3, 5, dtype=torch.float64)

    def loss(mask: Tensor) -> Tensor:
        with masked(model, sites, mask, batch_statistics=batch_statistics):
            return (model(example) * target).sum()

    leaf = mask.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32
    with torch.no_grad():
        numeric = torch.stack(
            [(loss(mask + shift) - loss(mask - shift)) / (2 * step) for shift in torch.eye(len(mask)) * step]
        )
    close(leaf.grad.double(), numeric, 1e-4)
    for site in sites:
        assert leaf.grad[site.offset : site.offset + site.neurons].any(), f"nothing arrives at {site.path}"


def test_gradient_against_plain_torch() -> None:
    torch.manual_seed(0)
    conv, bn, head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
    model = randomize(nn.Sequential(conv, bn, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)).eval()
    example, labels = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    sites = find_sites(model, example)
    for batch_statistics in (False, True):
        ours, theirs = (torch.linspace(0, 1, 6).requires_grad_() for _ in range(2))
        with masked(model, sites, ours, batch_statistics=batch_statistics):
            F.cross_entropy(model(example), labels).backward()
        statistics = (None, None) if batch_statistics else (bn.running_mean, bn.running_var)
        y = F.batch_norm(conv(example), *statistics, theirs * bn.weight, bn.bias, batch_statistics, 0.0, bn.eps)
        F.cross_entropy(head(y.relu().mean((2, 3))), labels).backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        close(ours.grad, theirs.grad)


def test_gradient_arrives_once_and_only_at_the_mask() -> None:
    model, example = stranger()
    sites = find_sites(model, example)
    mask = torch.ones(total_neurons(sites), requires_grad=True)
    arrivals: list[torch.Size] = []
    with masked(model, sites, mask):
        split = model(example)
        mask.register_hook(lambda grad: arrivals.append(grad.shape))
        split.square().sum().backward()
    assert arrivals == [mask.shape]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------- batch statistics
def train_norms(model: nn.Module) -> nn.Module:
    """A copy in which BatchNorm alone is in training mode."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    return model


@pytest.mark.parametrize("name", ["elu vgg", "narrow resnet18", "timm mobilenetv2_100", "stranger"])
@torch.no_grad()
def test_batch_statistics(name: str) -> None:
    model, example = stranger() if name == "stranger" else make({**ARCHITECTURES, **SMALL}[name])
    sites = find_sites(model, example)
    expected = train_norms(model)(example)
    assert (expected - model(example)).abs().max() > 1e-3
    model.train()
    before = snapshot(model)
    for mask in (torch.ones(total_neurons(sites)), None):
        with masked(model, sites, mask, batch_statistics=True):
            close(model(example), expected, 2e-4 if name.startswith("timm") else 1e-5)
        assert snapshot(model) | {"calls bits": None} == before | {"calls bits": None}
    keep = keep_most(sites)
    with masked(model, sites, keep.float(), batch_statistics=True):
        hard = model(example)
    prune_(model, sites, keep)
    close(hard, train_norms(model)(example), 2e-4 if name.startswith("timm") else 1e-5)


def test_without_a_mask_the_weights_train_on_batch_statistics() -> None:
    torch.manual_seed(0)
    norms = nn.Sequential(nn.BatchNorm2d(4), BareNorm(4), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norms, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    example = torch.randn(4, 3, 8, 8)
    sites = find_sites(model, example)
    before = snapshot(model)
    with masked(model, sites, None, batch_statistics=True):
        output = model(example)
        output.square().sum().backward()
    reference = train_norms(model)
    expected = reference(example)
    reference.zero_grad()
    expected.square().sum().backward()
    close(output, expected)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        close(ours.grad, theirs.grad)
    assert snapshot(model) == before


@torch.no_grad()
def test_norm_without_running_statistics() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.LazyLinear(2)
    )
    example = torch.randn(4, 3, 6, 6)
    plain = model(example)
    sites = find_sites(model, example)
    with masked(model, sites, torch.ones(4)):
        close(model(example), plain)


# ---------------------------------------------------------------- taking off
def test_exceptions_restore_everything() -> None:
    model, example = stranger()
    model.train()
    model.last.weight.requires_grad_(False)
    sites = find_sites(model, example)
    mask = torch.rand(total_neurons(sites))
    before = snapshot(model) | {"calls bits": None}
    for batch_statistics in (False, True):
        with pytest.raises(KeyboardInterrupt), masked(model, sites, mask, batch_statistics=batch_statistics):
            raise KeyboardInterrupt
        with pytest.raises(RuntimeError), masked(model, sites, mask, batch_statistics=batch_statistics):
            model(example[:, :2])
        assert snapshot(model) | {"calls bits": None} == before


def test_state_dict_inside_is_that_of_the_plain_model() -> None:
    model, example = stranger()
    sites = find_sites(model, example)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del plain["calls"]
    with masked(model, sites, torch.zeros(total_neurons(sites))):
        model(example)
        inside = model.state_dict()
        assert all(torch.equal(inside[name], tensor) for name, tensor in plain.items())


def test_own_forward_attribute_and_hooks_survive() -> None:
    model, example = stranger()
    calls: list[str] = []
    inner = model.entry.forward
    model.entry.forward = lambda x: (calls.append("forward"), inner(x))[1]
    model.bn.register_forward_hook(lambda module, args, output: calls.append("hook"))
    sites = find_sites(model, example)
    calls.clear()
    before = snapshot(model)
    with masked(model, sites, torch.ones(total_neurons(sites))):
        model(example)
    assert calls == ["forward", "hook"]
    assert snapshot(model) | {"calls bits": None} == before | {"calls bits": None}


def test_a_second_mask_is_refused() -> None:
    model, example = stranger()
    sites = find_sites(model, example)
    mask = torch.ones(total_neurons(sites))
    before = snapshot(model)
    with masked(model, sites, mask):
        with pytest.raises(ConfigError, match="under a mask already"), masked(model, sites, mask):
            pass
        model(example)
    with masked(model, sites, mask), masked(copy.deepcopy(model), sites, mask):
        pass
    assert snapshot(model) | {"calls bits": None} == before | {"calls bits": None}


def test_fast_path_of_transformer_encoders_is_not_taken() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(24, 2)).eval()
    example = torch.randn(2, 3, 8)
    with torch.no_grad():
        sites = find_sites(model, example)
        assert [site.kind for site in sites] == ["heads", "mlp"] * 2
        with masked(model, sites, torch.zeros(total_neurons(sites))):
            assert not torch.allclose(model(example), model[2](torch.zeros(2, 24)))
            zero = model(example)
        prune_(model, sites, torch.zeros(total_neurons(sites), dtype=torch.bool))
        close(zero, model(example))
    assert torch.backends.mha.get_fastpath_enabled()


# ---------------------------------------------------------------- precision and errors
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_bfloat16_is_as_good_as_that_of_plain_torch(batch_statistics: bool) -> None:
    model, example = make(SMALL["narrow resnet18"])
    sites = find_sites(model, example)
    gains = [model.get_parameter(f"{site.path}.weight").detach() for site in sites]

    def ours(mask: Tensor, low: bool) -> Tensor:
        with masked(model, sites, mask, batch_statistics=batch_statistics), torch.autocast("cpu", enabled=low):
            return model(example)

    def plain(mask: Tensor, low: bool) -> Tensor:
        views = mask.split([site.neurons for site in sites])
        weights = {f"{s.path}.weight": gain * m for s, gain, m in zip(sites, gains, views, strict=True)}
        with torch.autocast("cpu", enabled=low):
            reference = train_norms(model) if batch_statistics else model
            return torch.func.functional_call(reference, weights, (example,))

    def run(forward: Callable[[Tensor, bool], Tensor], low: bool) -> tuple[Tensor, Tensor]:
        mask = torch.linspace(0.5, 1, total_neurons(sites)).requires_grad_()
        output = forward(mask, low)
        assert output.dtype == (torch.bfloat16 if low else torch.float32)
        (grad,) = torch.autograd.grad(output.float().square().sum(), mask)
        assert grad.dtype == torch.float32
        return output.detach().float(), grad

    exact, low, reference = run(plain, False), run(ours, True), run(plain, True)
    for wanted, got, theirs in zip(exact, low, reference, strict=True):
        assert (got - wanted).norm() <= 2 * (theirs - wanted).norm()
    for wanted, got in zip(exact, run(ours, False), strict=True):
        close(got, wanted, 1e-4)


@pytest.mark.parametrize("batch_statistics", [False, True])
@torch.no_grad()
def test_weights_in_bfloat16(batch_statistics: bool) -> None:
    model, example = stranger()
    sites = find_sites(model, example)
    mask = torch.linspace(0.5, 1, total_neurons(sites))
    with masked(model, sites, mask, batch_statistics=batch_statistics):
        expected = model(example)
    model.bfloat16()
    with masked(model, sites, mask, batch_statistics=batch_statistics):
        output = model(example.bfloat16())
    assert output.dtype == torch.bfloat16
    close(output.float(), expected, 0.1)


def test_masks_that_do_not_fit_are_refused() -> None:
    model, example = make(SMALL["elu vgg"])
    sites = find_sites(model, example)
    for mask in (torch.ones(447), torch.ones(448, dtype=torch.float64), torch.ones(1, 448)):
        with pytest.raises(ConfigError, match="the mask must be"), masked(model, sites, mask):
            pass
    with pytest.raises(ConfigError, match="offsets have gaps"), masked(model, sites[1:], torch.ones(416)):
        pass
    with pytest.raises(ConfigError, match="bool"):
        prune_(model, sites, torch.ones(448))
    with pytest.raises(ConfigError, match="find the sites of this very model"):
        prune_(narrow_resnet18(), sites, torch.ones(448, dtype=torch.bool))


def test_prune_leaves_kept_neurons_and_biases_alone() -> None:
    model, example = stranger()
    sites = find_sites(model, example)
    before = copy.deepcopy(model.state_dict())
    prune_(model, sites, torch.ones(total_neurons(sites), dtype=torch.bool))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    prune_(model, sites, torch.zeros(total_neurons(sites), dtype=torch.bool))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{site.path}.{site.parameter}".lstrip(".") for site in sites}
    assert not any(model.get_parameter(name).any() for name in changed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    for build in (lambda: stranger(), lambda: make(SMALL["narrow resnet18"])):
        model, example = build()
        model, example = model.cuda(), example.cuda()
        sites = find_sites(model, example)
        keep = keep_most(sites).cuda()
        mask = keep.float().requires_grad_()
        with masked(model, sites, mask):
            hard = model(example)
            hard.square().sum().backward()
        assert mask.grad is not None
        assert mask.grad.is_cuda
        prune_(model, sites, keep)
        close(hard.detach(), model(example).detach(), 1e-3)


def test_samples_one_by_one() -> None:
    """A layer that is given a sample without its batch."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.last(F.relu(self.first(row))) for row in x])

    torch.manual_seed(0)
    model, x = One().eval(), torch.randn(4, 5)
    sites = find_sites(model, x)
    mask = torch.rand(total_neurons(sites))
    with torch.no_grad(), masked(model, sites, mask):
        found = model(x)
    assert torch.allclose(found, model.last(F.relu(model.first(x)) * mask), atol=1e-6)
