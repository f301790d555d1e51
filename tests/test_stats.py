"""magnitude, against norms worked out layer by layer."""

from __future__ import annotations

import torch
from networks import SMALL, Stranger, make
from torch import nn

from mnp_fast.sites import find_sites, total_neurons
from mnp_fast.stats import magnitude


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
