"""What weights alone say of the neurons: their magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mnp_fast.sites import Site, Source, site_parameter, total_neurons


def magnitude(model: nn.Module, sites: Sequence[Site], *, normalize: bool = True) -> Tensor:
    """M_i, the L1 norm of each neuron's weights over the mean of that norm over all neurons of its kind.

    One mean for the whole model would make the penalty on a head 51 times that on the average neuron of a ViT-S, since
    a head owns 64 rows; with one kind of site, as in most CNNs, the two are the same.

    The magnitude of MNP (arXiv 2405.17750): the weights of a neuron are its filter (conv, and the convolution or linear
    layer in front of a BatchNorm), its row of the first linear layer and of the gate (mlp), its value rows (heads).
    Where these are not known, the parameter that pruning would set to zero stands in: |gamma|, or the columns of the
    projection. Such values are divided by their own mean, since a gain and a filter have no common unit.

    Returns float32, shape (total_neurons(sites),), on the device of the first site, without gradient; with
    ``normalize=False`` the L1 norms themselves.
    """
    devices = [site_parameter(model, site.path, site.parameter)[1].device for site in sites[:1]]
    out = torch.empty(total_neurons(sites), dtype=torch.float32, device=next(iter(devices), None))
    groups: dict[tuple[str, bool], list[slice]] = {}
    rows: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad():
        for site in sites:
            part = slice(site.offset, site.offset + site.neurons)
            groups.setdefault((site.kind, bool(site.sources)), []).append(part)
            norms = [_source_norm(model, site, source, rows) for source in site.sources] or [_own_norm(model, site)]
            out[part] = torch.stack([norm.to(out) for norm in norms]).sum(0)
        if normalize:
            for parts in groups.values():
                mean = torch.cat([out[part] for part in parts]).mean().clamp_min(torch.finfo(out.dtype).tiny)
                for part in parts:
                    out[part] /= mean
    return out


def _source_norm(model: nn.Module, site: Site, source: Source, cache: dict[tuple[str, str], Tensor]) -> Tensor:
    key = (source.path, source.parameter)
    if key not in cache:
        cache[key] = _row_norms(*site_parameter(model, *key))
    index = torch.as_tensor(source.rows, device=cache[key].device)
    return cache[key][index].view(site.neurons, -1).sum(1)


def _own_norm(model: nn.Module, site: Site) -> Tensor:
    weight = site_parameter(model, site.path, site.parameter)[1].detach().float().abs()
    if site.kind in ("mlp", "heads"):
        return weight.sum(0).view(site.neurons, site.repeat).sum(1)
    return weight.reshape(site.neurons, -1).sum(1)


def _row_norms(module: nn.Module, weight: Tensor) -> Tensor:
    """L1 norm of the weights of each output channel, biases left out."""
    weight = weight.detach().float().abs()
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, ...)
        return weight.flatten(2).sum(2).view(module.groups, -1, weight.shape[1]).sum(1).flatten()
    return weight.flatten(1).sum(1)
