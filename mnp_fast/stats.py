"""What weights alone say of the neurons: their magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mnp_fast.ops import channel_magnitude
from mnp_fast.ops.op_channel_magnitude import DTYPES
from mnp_fast.sites import Site, site_parameter, total_neurons

_Key = tuple[str, str, bool]
"""Module, parameter, and whether its columns count, not its rows."""


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
    norms = _norms({key: _weight(model, *key) for site in sites for key in _keys(site)})
    for site in sites:
        part = slice(site.offset, site.offset + site.neurons)
        groups.setdefault((site.kind, bool(site.sources)), []).append(part)
        found = [norms[key] for key in _keys(site)]
        if site.sources:
            indices = [torch.as_tensor(source.rows, device=out.device) for source in site.sources]
            found = [norm.to(out)[index] for norm, index in zip(found, indices, strict=True)]
        out[part] = torch.stack([norm.to(out).view(site.neurons, -1).sum(1) for norm in found]).sum(0)
    if normalize:
        for parts in groups.values():
            mean = torch.cat([out[part] for part in parts]).mean().clamp_min(torch.finfo(out.dtype).tiny)
            for part in parts:
                out[part] /= mean
    return out


def _keys(site: Site) -> list[_Key]:
    """The weights of the site's neurons: those that make them, or the one that pruning would set to zero."""
    columns = site.kind in ("mlp", "heads")
    made = [(source.path, source.parameter, False) for source in site.sources]
    return made or [(site.path, site.parameter, columns)]


def _weight(model: nn.Module, path: str, parameter: str, columns: bool) -> Tensor:
    """The weight with its output channels in dim 0, or its input channels where `columns`."""
    module, own = site_parameter(model, path, parameter)
    weight = own.detach() if own.dtype in DTYPES else own.detach().float()
    if columns:
        return weight.transpose(0, 1)
    if isinstance(module, _ConvTransposeNd):  # (in, out / groups, ...)
        return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight


def _norms(weights: dict[_Key, Tensor]) -> dict[_Key, Tensor]:
    """L1 norm of each output channel: one launch for all weights, or one for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[_Key]] = {}
    for key, weight in weights.items():
        groups.setdefault((weight.device, weight.dtype), []).append(key)
    found: dict[_Key, Tensor] = {}
    for keys in groups.values():
        norms = channel_magnitude([weights[key] for key in keys])[0]
        found.update(zip(keys, norms.split([len(weights[key]) for key in keys]), strict=True))
    return found
