"""find_sites: every kind of site in published architectures and in modules of one's own; the model is left alone."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from networks import ARCHITECTURES, SMALL, Stranger, make, snapshot
from torch import Tensor, nn

from mnp_fast.errors import ModelError
from mnp_fast.graph.capture import capture
from mnp_fast.masked import Execution, masked, prune_
from mnp_fast.sites import Site, Source, find_sites, site_names, total_neurons


def kinds(sites: tuple[Site, ...]) -> dict[str, tuple[int, int]]:
    count, neurons = Counter(site.kind for site in sites), Counter[str]()
    for site in sites:
        neurons[site.kind] += site.neurons
    return {kind: (count[kind], neurons[kind]) for kind in count}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SMALL])
def test_architecture(name: str) -> None:
    architecture = {**ARCHITECTURES, **SMALL}[name]
    model, example = make(architecture)
    before = snapshot(model)
    sites = find_sites(model, example)
    assert snapshot(model) == before
    assert kinds(sites) == architecture.expected
    offset = 0
    for site in sites:
        assert site.offset == offset
        offset += site.neurons
        weight = model.get_submodule(site.path).get_parameter(site.parameter)
        if site.kind in ("mlp", "heads"):
            assert weight.shape[1] == site.neurons * site.repeat
        else:
            assert weight.shape[0] == site.neurons
        assert site.sources, f"nothing is known to make the neurons of {site.path}"
        for source in site.sources:
            rows = model.get_submodule(source.path).get_parameter(source.parameter).shape[0]
            assert len(source.rows) % site.neurons == 0
            assert 0 <= min(source.rows) <= max(source.rows) < rows
    assert total_neurons(sites) == offset
    assert len({(site.path, site.parameter) for site in sites}) == len(sites)


def test_strangers_module() -> None:
    torch.manual_seed(0)
    sites = find_sites(Stranger(), torch.randn(2, 3, 8, 8))
    names = [(site.path or site.parameter, site.kind, site.neurons) for site in sites]
    assert names == list(Stranger.found)
    by_path = {site.path: site for site in sites}
    assert by_path["bare"].sources == (Source("deep", "weight", range(6)),)
    assert by_path["bn"].sources == (Source("first", "weight", range(12)),)
    assert by_path["down"].sources == (Source("gate", "weight", range(10)), Source("gate", "weight", range(10, 20)))
    values = tuple(12 * head + 8 + i for head in range(3) for i in range(4))
    assert by_path["mixed"].sources == (Source("qkv", "weight", values),)
    attention = by_path["encoder.self_attn.out_proj"]
    assert attention.sources == (Source("encoder.self_attn", "in_proj_weight", range(24, 36)),)
    assert attention.functional
    assert by_path[""].functional
    assert attention.repeat == 3
    assert not by_path["mixed"].functional


def test_model_is_left_as_it_was() -> None:
    model = Stranger().train()
    model.entry.eval()
    model.first.register_forward_hook(lambda module, args, output: None)
    model.last.weight.requires_grad_(False)
    torch.rand(3)
    before = snapshot(model)
    find_sites(model, torch.zeros(2, 3, 8, 8))
    assert snapshot(model) == before


def test_model_that_fails_is_left_as_it_was() -> None:
    model = Stranger().train()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"cannot run on an input of shape \(2, 1, 8, 8\)"):
        find_sites(model, torch.zeros(2, 1, 8, 8))
    assert snapshot(model) == before


def test_random_functions_do_not_advance_the_generator() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.conv(x).mean((2, 3))) + torch.rand(4))

    model = Noisy()
    before = snapshot(model)
    assert len(find_sites(model, torch.ones(2, 3, 4, 4))) == 1
    assert snapshot(model) == before


# ---------------------------------------------------------------- rules
class Chain(nn.Module):
    """Layers by name and a forward given as a function of the module and its input."""

    def __init__(self, forward, **layers: nn.Module) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.rule = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


def found(model: nn.Module, *shape: int) -> list[tuple[str, str, int]]:
    return [(site.path, site.kind, site.neurons) for site in find_sites(model, torch.rand(shape))]


def test_convolution_that_makes_the_logits_is_no_site() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    assert found(nn.Sequential(body, nn.Flatten()), 2, 3, 8, 8) == [("0.0", "conv", 4)]
    assert found(nn.Sequential(body, nn.Flatten(), nn.Linear(5, 2)), 2, 3, 8, 8)[-1] == ("0.2", "conv", 5)


def test_batch_norm_that_makes_the_logits_is_no_site() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert found(model, 2, 6) == [("2", "mlp", 4)]


def test_convolution_with_batch_norm_behind_part_of_it_stays_a_site() -> None:
    def half(self: Chain, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return self.head((self.bn(a) + b).mean((2, 3)))

    model = Chain(half, conv=nn.Conv2d(3, 8, 1), bn=nn.BatchNorm2d(4), head=nn.Linear(4, 2))
    assert found(model, 2, 3, 4, 4) == [("conv", "conv", 8), ("bn", "batch_norm", 4)]


def test_position_bias_from_weights_alone_is_no_site() -> None:
    def biased(self: Chain, x: Tensor) -> Tensor:
        bias = self.bias2(self.bias1(torch.ones(1, 2)).relu())
        return self.fc2(self.fc1(self.conv(x[:, None]).mean(1)) + bias)

    layers = {"bias1": nn.Linear(2, 7), "bias2": nn.Linear(7, 5), "fc1": nn.Linear(6, 5), "fc2": nn.Linear(5, 3)}
    assert found(Chain(biased, conv=nn.Conv1d(1, 4, 1), **layers), 2, 6) == [("conv", "conv", 4)]


def test_linear_layers_without_activation_or_over_a_residual_are_no_mlp() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    assert found(model, 2, 2, 6) == [("0", "conv", 3)]

    def residual(self: Chain, x: Tensor) -> Tensor:
        return self.fc2(x + self.fc1(x).relu()) + self.fc3(self.fc1(x).relu())

    model = Chain(residual, fc1=nn.Linear(6, 6), fc2=nn.Linear(6, 3), fc3=nn.Linear(6, 3))
    assert found(model, 2, 6) == [("fc3", "mlp", 6)]


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(inplace=True),
        nn.GELU(approximate="tanh"),
        nn.Hardswish(),
        nn.Sequential(nn.LayerNorm(8), nn.Mish(), nn.Dropout(0.5), nn.LayerNorm(8)),
        nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.ELU()),
    ],
)
def test_mlp_activations(act: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 3))
    assert found(model, 2, 6) == [("2", "mlp", 8)]


def test_glu() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3))
    (site,) = find_sites(model, torch.rand(2, 6))
    assert (site.path, site.kind, site.neurons) == ("2", "mlp", 4)
    assert site.sources == (Source("0", "weight", range(4)), Source("0", "weight", range(4, 8)))


def test_heads_written_out() -> None:
    def einsum(self: Chain, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (3, 4)) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd, bkhd -> bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk, bkhd -> bqhd", weights, v).flatten(2))

    layers = {name: nn.Linear(12, 12) for name in ("q", "k", "v", "out")}
    (site,) = find_sites(Chain(einsum, **layers), torch.rand(2, 5, 12))
    assert (site.path, site.kind, site.neurons, site.repeat) == ("out", "heads", 3, 4)
    assert site.sources == (Source("v", "weight", range(12)),)


def test_heads_that_share_a_value() -> None:
    def grouped(self: Chain, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2) * self.gate(x).sigmoid())

    layers = {"q": nn.Linear(12, 12), "k": nn.Linear(12, 6), "v": nn.Linear(12, 6), "out": nn.Linear(12, 12)}
    (site,) = find_sites(Chain(grouped, gate=nn.Linear(12, 12), **layers), torch.rand(2, 5, 12))
    assert (site.path, site.kind, site.neurons, site.repeat) == ("out", "heads", 4, 3)
    assert tuple(site.sources[0].rows) == (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5)


def test_cross_attention_with_its_own_value_width() -> None:
    def cross(self: Chain, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :6], x[..., :8], need_weights=False)[0]

    (site,) = find_sites(
        Chain(cross, attention=nn.MultiheadAttention(12, 2, kdim=6, vdim=8, batch_first=True)), torch.rand(2, 5, 12)
    )
    assert (site.path, site.kind, site.neurons, site.repeat) == ("attention.out_proj", "heads", 2, 6)
    assert site.sources == (Source("attention", "v_proj_weight", range(12)),)


def test_weight_shared_by_two_modules_is_one_site() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    model[2].weight = model[0].weight
    (site,) = find_sites(model, torch.rand(2, 3, 2, 2))
    assert site.functional


def test_norms_that_share_their_weight_are_one_site() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.uniform_(-1, 1)
    model[4].weight = model[1].weight
    images = torch.rand(2, 3, 4, 4)
    (site,) = find_sites(model, images)
    assert (site.path, site.kind, site.functional) == ("1", "batch_norm", True)
    keep = torch.tensor([True, False, True, False])
    with torch.no_grad():
        with masked(model, (site,), keep.float(), how=Execution(capture(model, (site,), images))):
            expected = model(images)
        prune_(model, (site,), keep)
        torch.testing.assert_close(model(images), expected)


def test_logits_under_an_attribute_are_no_site() -> None:
    layers = {"body": nn.Conv2d(3, 4, 1), "head": nn.Conv2d(4, 5, 1)}
    model = Chain(lambda self, x: SimpleNamespace(logits=self.head(self.body(x).relu()).mean((2, 3))), **layers)
    assert found(model, 2, 3, 4, 4) == [("body", "conv", 4)]


def test_names() -> None:
    sites = [Site("a", "conv", 2, 0), Site("b", "mlp", 1, 2, parameter="v"), Site("b", "mlp", 1, 3, parameter="w")]
    assert site_names([*sites, Site("", "conv", 1, 4)]) == ["a", "b.v", "b.w", "weight"]


def test_weights_computed_from_a_parameter() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.flatten(1)[None], None, None, torch.ones(4), training=True)
            return self._conv_forward(input, weight.view_as(self.weight), self.bias)

    model = nn.Sequential(Standardized(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    assert found(model, 2, 3, 2, 2) == [("0", "conv", 4)]
    spectral = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), nn.Flatten()
    )
    assert found(nn.Sequential(spectral, nn.Linear(16, 2)), 2, 3, 2, 2) == [("0.1", "batch_norm", 4)]


def test_nothing_to_prune() -> None:
    with pytest.raises(ModelError, match="nothing to prune"):
        find_sites(nn.Linear(3, 2), torch.rand(2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lazy_scripted_and_compiled_models_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    example = torch.rand(2, 3, 2, 2)
    with pytest.raises(ModelError, match="no values yet"):
        find_sites(nn.Sequential(nn.LazyConv2d(4, 1), nn.Flatten()), example)
    with pytest.raises(ModelError, match="TorchScript"):
        find_sites(torch.jit.trace(model, example), example)
    with pytest.raises(ModelError, match=r"torch\.compile"):
        find_sites(torch.compile(model, backend="eager"), example)
