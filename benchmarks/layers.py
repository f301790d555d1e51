"""Masked layers in plain torch, for the baselines, and the reference that every provider is checked against.

`rewrite` replaces the layers of a network by masked ones, in one of two ways:

- ``on_weights``, as the published code of ANP and RNP does: the mask multiplies gamma or the filters in each forward;
- else as one would tune it with weights frozen: outputs of convolutions are multiplied, since the gradient of a mask on
  filters is as dear as that of the filters.

The reference does neither: it calls the unchanged network with masked weights through torch.func.functional_call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import register_parametrization

from mnp_fast.sites import Site, site_parameter


class MaskedBatchNorm(nn.Module):
    """BatchNorm with mask * gamma. In training mode on statistics of the batch; ``track``: running ones follow them."""

    def __init__(self, norm: _BatchNorm, mask: nn.Parameter, track: bool) -> None:
        super().__init__()
        self.norm, self.mask, self.track = norm, mask, track

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        weight = self.mask * norm.weight
        if self.training and not self.track:
            return F.batch_norm(x, None, None, weight, norm.bias, True, 0.0, norm.eps)
        momentum = 0.1 if norm.momentum is None else norm.momentum
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, weight, norm.bias, self.training, momentum, norm.eps
        )


class MaskedOutput(nn.Module):
    """A convolution whose output is multiplied: mask * (y - bias) + bias."""

    def __init__(self, conv: _ConvNd, mask: nn.Parameter) -> None:
        super().__init__()
        self.conv, self.mask = conv, mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        mask = self.mask.view(-1, *[1] * (y.dim() - 2))
        out = y * mask.to(y.dtype)
        if self.conv.bias is None:
            return out
        return out + (self.conv.bias.view_as(mask) * (1 - mask)).to(y.dtype)


class MaskedInput(nn.Linear):
    """A linear layer on hidden units or heads times the mask; a neuron owns ``repeat`` columns.

    Still a linear layer to those that read its weight, as torch's encoder layer does.
    """

    def __init__(self, linear: nn.Linear, mask: nn.Parameter, repeat: int) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.mask, self.repeat = mask, repeat

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask if self.repeat == 1 else self.mask.repeat_interleave(self.repeat)
        return F.linear(x * mask.to(x.dtype), self.weight, self.bias)


class MaskedWeight(nn.Module):
    """Parametrization that multiplies a weight by the mask, along the dimension of its neurons."""

    def __init__(self, site: Site, mask: nn.Parameter) -> None:
        super().__init__()
        self.site, self.mask = site, mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * spread(self.site, weight, self.mask)


def rewrite(model: nn.Module, sites: Sequence[Site], masks: Sequence[nn.Parameter], *, on_weights: bool) -> nn.Module:
    """A copy of ``model`` with a mask at every site, masks[i] of shape (sites[i].neurons,)."""
    net = copy.deepcopy(model)
    for site, mask in zip(sites, masks, strict=True):
        module, _ = site_parameter(net, site.path, site.parameter)
        if isinstance(module, _ConvTransposeNd):
            raise SystemExit(f"{site.path}: transposed convolutions have no baseline")
        if isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward:
            net.set_submodule(site.path, MaskedBatchNorm(module, mask, track=on_weights))
        elif isinstance(module, _ConvNd) and site.kind == "conv" and not site.functional and not on_weights:
            net.set_submodule(site.path, MaskedOutput(module, mask))
        elif isinstance(module, nn.Linear) and not site.functional and site.kind in ("mlp", "heads"):
            net.set_submodule(site.path, MaskedInput(module, mask, site.repeat))
        else:
            register_parametrization(module, site.parameter, MaskedWeight(site, mask))
    return net


def use_batch_statistics_(net: nn.Module) -> nn.Module:
    """Every BatchNorm into training mode, all else as it is."""
    for module in net.modules():
        if isinstance(module, (MaskedBatchNorm, _BatchNorm)):
            module.training = True
    return net


def reference(
    model: nn.Module, sites: Sequence[Site], mask: Tensor, images: Tensor, labels: Tensor, *, batch_statistics: bool
) -> tuple[float, Tensor]:
    """(loss, its gradient with respect to the flat mask) in float32, with masked weights in an unchanged network."""
    net = copy.deepcopy(model).float().eval()
    if batch_statistics:
        use_batch_statistics_(net)
    leaf = mask.detach().clone().requires_grad_()
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    for site in sites:
        name = f"{site.path}.{site.parameter}".removeprefix(".")
        part = leaf[site.offset : site.offset + site.neurons]
        weights[name] = weights[name] * spread(site, weights[name], part)
    loss = F.cross_entropy(functional_call(net, weights, (images,)), labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient


def spread(site: Site, weight: Tensor, vector: Tensor) -> Tensor:
    """``vector`` (neurons,) shaped so that it broadcasts over the weight of the site."""
    if site.kind in ("mlp", "heads"):
        return vector.repeat_interleave(site.repeat)
    return vector.view(-1, *[1] * (weight.dim() - 1))
