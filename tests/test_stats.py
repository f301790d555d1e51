"""Magnitude against norms worked out layer by layer, saliency against autograd and removals one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ARCHITECTURES, SMALL, Stranger, logits, make, randomize, snapshot
from torch import Tensor, nn

from mnp_fast import stats
from mnp_fast.errors import ConfigError, DataError
from mnp_fast.graph.capture import capture
from mnp_fast.masked import MODULES, Execution, masked, prune_
from mnp_fast.sites import Site, find_sites, total_neurons
from mnp_fast.stats import exact_saliency, magnitude, rank_correlation, saliency


def test_magnitude_of_every_kind_of_site() -> None:
    torch.manual_seed(0)
    model = Stranger()
    sites = find_sites(model, torch.randn(2, 3, 8, 8))
    gate, qkv = model.gate.weight.abs().sum(1), model.qkv.weight.abs().sum(1)
    up = model.up.weight.abs()  # (6 in, 4 out in each of 2 groups, 2, 2)
    in_proj = model.encoder.self_attn.in_proj_weight.abs().sum(1)
    expected = {
        "entry": model.entry.weight.abs().sum((1, 2, 3)),
        "twice": model.twice.weight.abs().sum((1, 2, 3)),
        "bare": model.deep.weight.abs().sum((1, 2, 3)),
        "up": torch.cat([up[:3].sum((0, 2, 3)), up[3:].sum((0, 2, 3))]),
        "plain": model.plain.weight.abs().sum((1, 2, 3)),
        "": model.raw.abs().sum((1, 2, 3)),
        "bn": model.first.weight.abs().sum(1),
        "down": gate[:10] + gate[10:],
        "mixed": qkv.view(3, 3, 4)[:, 2].sum(1),
        "encoder.self_attn.out_proj": in_proj[24:].view(4, 3).sum(1),
        "encoder.linear2": model.encoder.linear1.weight.abs().sum(1),
        "last": model.hidden.weight.abs().sum(1),
    }
    raw = magnitude(model, sites, normalize=False)
    torch.testing.assert_close(raw, torch.cat([expected[site.path].detach() for site in sites]))
    normalized = magnitude(model, sites)
    for kind in {site.kind for site in sites}:
        of_kind = torch.cat([torch.arange(s.offset, s.offset + s.neurons) for s in sites if s.kind == kind])
        torch.testing.assert_close(normalized[of_kind], raw[of_kind] / raw[of_kind].mean())
    assert raw.dtype == torch.float32
    assert not raw.requires_grad


def test_transposed_convolution_has_as_many_rows_as_outputs() -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.Flatten(), nn.LazyLinear(2))
    example = torch.rand(2, 4, 3, 3)
    model(example)
    sites = find_sites(model, example)
    assert [site.kind for site in sites] == ["batch_norm"]
    weight = conv.weight.detach().abs().sum((2, 3)).view(2, 2, 3).sum(1).flatten()
    torch.testing.assert_close(magnitude(model, sites, normalize=False), weight)


def test_gain_stands_in_where_no_filter_is_known() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    example = torch.rand(2, 3, 6, 6)
    model(example)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-1.0, 2.0, 3.0]))
    sites = find_sites(model, example)
    assert [bool(site.sources) for site in sites] == [False, True]
    torch.testing.assert_close(magnitude(model, sites, normalize=False)[:3], torch.tensor([1.0, 2.0, 3.0]))
    normalized = magnitude(model, sites)
    torch.testing.assert_close(normalized[:3], torch.tensor([0.5, 1.0, 1.5]))
    torch.testing.assert_close(normalized[3:].mean(), torch.tensor(1.0))


def test_magnitude_is_the_same_in_bfloat16_and_for_zero_weights() -> None:
    model, example = make(SMALL["elu vgg"])
    sites = find_sites(model, example)
    exact = magnitude(model, sites)
    assert exact.shape == (total_neurons(sites),)
    assert abs(exact.mean().item() - 1) < 1e-5
    low = magnitude(model.bfloat16(), sites)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not magnitude(model, sites).any()


def test_magnitude_of_weights_of_several_dtypes() -> None:
    model, example = make(SMALL["elu vgg"])
    sites = find_sites(model, example)
    exact = magnitude(model, sites)
    torch.testing.assert_close(magnitude(model.double(), sites), exact, rtol=1e-6, atol=0)
    weights = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for weight in (module.weight for module in weights):
            weight.copy_(weight.bfloat16())
    exact = magnitude(model.float(), sites)
    weights[1].bfloat16()
    torch.testing.assert_close(magnitude(model, sites), exact, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- saliency
class Folded(nn.Module):
    """Pictures in every place that attention and windows put them: (T, B, C), rows of a batch apart and together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.outer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=False)
        self.windows = nn.TransformerEncoderLayer(8, 4, 6, batch_first=True)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))  # (b, 8, 4, 4)
        b = x.shape[0]
        x = torch.cat([self.token.expand(b, -1, -1), x.flatten(2).transpose(1, 2)], 1)  # (b, 17, 8)
        x = self.outer(x.transpose(0, 1)).transpose(0, 1)[:, 1:]
        x = self.windows(x.reshape(b * 4, 4, 8)).view(b, 16, 8)
        return self.head(self.norm(x.transpose(1, 2).unflatten(2, (4, 4))).mean((2, 3)))


class TrainedStatistics(nn.Module):
    """BatchNorm without running statistics: every picture's loss depends on all pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6, track_running_stats=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class Aliased(nn.Module):
    """A value that is changed in place under another name, behind a site that it does not belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        half = 0.5 * x
        flat = half.flatten(2)
        y = self.second(torch.tanh(x))
        flat += 0.5
        return self.head(y.mean((2, 3)) + half.square().mean((2, 3)))


class Thresholds(nn.Module):
    """A value that no picture can be told in, and pictures' sizes in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        top = x > 0.1
        y = self.second(x) * top[:, :, 1:-1, 1:-1]
        return self.head(y.flatten(2).transpose(1, 2).reshape(x.shape[0] * 16, 6).view(x.shape[0], 16, 6).sum(1))


OWN = {
    "stranger": Stranger,
    "folded": Folded,
    "batch statistics": TrainedStatistics,
    "aliased": Aliased,
    "thresholds": Thresholds,
}
ALL = [
    *OWN,
    "elu vgg",
    "resnet20, padded shortcuts",
    "torchvision vit_b_16",
    "torchvision swin_t",
    "timm convnext_tiny",
]


def found(name: str, count: int = 5) -> tuple[nn.Module, tuple[Site, ...], Tensor, Tensor]:
    """(model, sites, pictures, labels)."""
    if name in OWN:
        torch.manual_seed(0)
        model, size = randomize(OWN[name]()).eval(), 8
    else:
        model, example = make((ARCHITECTURES | SMALL)[name])
        size = example.shape[-1]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    return model, find_sites(model, images), images, labels


def by_picture(model: nn.Module, sites: Any, images: Tensor, labels: Tensor) -> Tensor:
    """(pictures, neurons): the gradient of every picture's own loss, with the mask on the weights."""
    mask = torch.ones(total_neurons(sites), requires_grad=True)
    with masked(model, sites, mask):
        losses = F.cross_entropy(logits(model(images)), labels, reduction="none")
        return torch.stack([torch.autograd.grad(loss, mask, retain_graph=True)[0] for loss in losses])


@pytest.fixture(params=[1, 2])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", ALL)
def test_saliency_is_that_of_each_picture(name: str) -> None:
    model, sites, images, labels = found(name)
    gradients = by_picture(model, sites, images, labels)
    captured = capture(model, sites, images)
    before = snapshot(model)
    assert (captured.reason is None) == (name != "stranger")  # which counts its calls in a buffer
    for how in (MODULES, Execution(captured)):
        with torch.no_grad():
            taylor, fisher = saliency(model, sites, images, labels, how=how)
        near(taylor, gradients.mean(0), 1e-3)
        near(fisher, gradients.square().mean(0), 1e-3)
    assert snapshot(model) == before


@torch.no_grad()
def by_removal(model: nn.Module, sites: Any, images: Tensor, labels: Tensor, neurons: Tensor) -> Tensor:
    """The change of the loss of copies whose weights are zero."""

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(logits(net(images)).double(), labels)

    changes = []
    for neuron in neurons.tolist():
        keep = torch.ones(total_neurons(sites), dtype=torch.bool)
        keep[neuron] = False
        pruned = copy.deepcopy(model)
        prune_(pruned, sites, keep)
        changes.append(loss(pruned) - loss(model))
    return torch.stack(changes).float()


def spread(sites: Any, each: int) -> Tensor:
    """``each`` neurons of every site, in no order, the first twice."""
    generator = torch.Generator().manual_seed(2)
    parts = [site.offset + torch.randperm(site.neurons, generator=generator)[:each] for site in sites]
    chosen = torch.cat([*parts, parts[0][:1]])
    return chosen[torch.randperm(len(chosen), generator=generator)]


@pytest.mark.parametrize("how", [None, MODULES])
def test_exact_saliency_of_labels_that_the_model_does_not_have(how: Any) -> None:
    model, sites, images, labels = found(next(iter(OWN)))
    with pytest.raises(DataError, match="number the labels as in training"):
        exact_saliency(model, sites, images, labels + 1000, torch.arange(2), how=how)


@pytest.mark.parametrize("name", ALL)
def test_exact_saliency_is_that_of_each_removal(name: str) -> None:
    model, sites, images, labels = found(name)
    neurons = spread(sites, 3 if name in OWN else 1)
    if name not in OWN:
        neurons = neurons[:8]
    expected = by_removal(model, sites, images, labels, neurons)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    near(exact_saliency(model, sites, images, labels, neurons), expected, 1e-3)
    near(exact_saliency(model, sites, images, labels, neurons, how=MODULES), expected, 1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("budget", [1, 3000, 40_000])
@pytest.mark.parametrize("name", ["folded", "resnet20, padded shortcuts"])
def test_exact_saliency_in_pieces(name: str, budget: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and neurons in as many parts as memory asks for: one at a time, and several."""
    model, sites, images, labels = found(name, 9)
    neurons = spread(sites, 3)[:12]
    expected = exact_saliency(model, sites, images, labels, neurons)
    near(expected, by_removal(model, sites, images, labels, neurons), 1e-3)
    monkeypatch.setattr(stats, "_BUDGET", budget)
    near(exact_saliency(model, sites, images, labels, neurons), expected, 1e-3)


@pytest.mark.parametrize(
    ("neurons", "problem"),
    [
        (torch.tensor([0, 10_000]), "these go from 0 to 10000"),
        (torch.tensor([-1, 2]), "these go from -1 to 2"),
        (torch.tensor([0.0]), "must be int64"),
        (torch.tensor([[0]]), "must be int64"),
    ],
)
def test_neurons_that_do_not_fit(neurons: Tensor, problem: str) -> None:
    model, sites, images, labels = found("folded")
    with pytest.raises(ConfigError, match=problem):
        exact_saliency(model, sites, images, labels, neurons, how=MODULES)


@pytest.mark.parametrize(
    "wrong", [lambda y: y[:-1], lambda y: y.float(), lambda y: y[:0], lambda y: y - 4, lambda y: y.unsqueeze(1)]
)
@pytest.mark.parametrize("of", ["saliency", "exact_saliency"])
def test_labels_that_do_not_fit(of: str, wrong: Any) -> None:
    model, sites, images, labels = found("folded")
    more = (torch.arange(2),) if of == "exact_saliency" else ()
    with pytest.raises(DataError, match="labels"):
        getattr(stats, of)(model, sites, images, wrong(labels), *more, how=MODULES)


# ---------------------------------------------------------------- agreement
def test_rank_correlation_in_every_site() -> None:
    layers = [nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).eval()
    sites = find_sites(model, torch.randn(2, 3, 2, 2))
    assert [site.neurons for site in sites] == [5, 4, 3]
    first = torch.tensor([1.0, 2, 2, 4, 5, 9, 8, 7, 6, 1, 1, 1])
    second = torch.tensor([2.0, 2, 1, 5, 4, -1, 2, 3, 4, 1, 2, 3])
    # By hand: ranks 1, 2.5, 2.5, 4, 5 and 2.5, 2.5, 1, 5, 4; 4, 3, 2, 1 and 1, 2, 3, 4; the last has no order.
    ranks = torch.tensor([[1, 2.5, 2.5, 4, 5], [2.5, 2.5, 1, 5, 4]], dtype=torch.float64)
    expected = [float(torch.corrcoef(ranks)[0, 1]), -1.0, 0.0]
    found = rank_correlation(first, second, sites)
    assert list(found) == [site.path for site in sites]
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)
    # Between sites nothing is compared, and a growing function changes no rank.
    moved = torch.cat([part + shift for part, shift in zip(first.split([5, 4, 3]), (0, 100, -50), strict=True)])
    assert rank_correlation(moved, second.exp(), sites) == pytest.approx(found)
    with pytest.raises(ConfigError, match=r"must have shape \(12,\)"):
        rank_correlation(first[:11], second, sites)
