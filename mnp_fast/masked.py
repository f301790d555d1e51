"""Run a model under a flat mask and take the mask off again; write the pruning into plain weights.

Module level: the sites' modules get a masked ``forward`` for as long as the context lasts, nothing else is rewritten.
Graph level: where the model has been captured, ``model(images)`` runs the captured graph instead, with equal numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from mnp_fast.errors import ConfigError
from mnp_fast.graph.program import products_in
from mnp_fast.graph.rewrite import program
from mnp_fast.graph.trace import Captured
from mnp_fast.ops import masked_affine, samples
from mnp_fast.replay import Recorder
from mnp_fast.sites import Site, columns, site_parameter, total_neurons

Views = list[Tensor]
_under_mask: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Execution:
    """How a model is run.

    captured: a trace of this model or of one that it is a copy of (`mnp_fast.graph.capture`); images that it stands for
    run through it and give logits, all others go through the modules. dtype: torch.bfloat16 for products in bfloat16
    (autocast, the sums of the kernels stay float32), None for the precision of the weights. recorder: captures steps as
    CUDA graphs where they have static shapes; None, as on every CPU: all steps run eagerly.
    """

    captured: Captured | None = None
    dtype: torch.dtype | None = None
    recorder: Recorder | None = None


MODULES = Execution()


@contextmanager
def masked(
    model: nn.Module,
    sites: Sequence[Site],
    mask: Tensor | None,
    *,
    batch_statistics: bool = False,
    how: Execution = MODULES,
) -> Iterator[nn.Module]:
    """``model(x)`` inside runs with every neuron multiplied by its entry of ``mask``; yields the model itself.

    mask: float32, shape (total_neurons(sites),), on the model's device; its gradient arrives as one tensor. None: no
    masks, every weight as it is and trainable. With a mask the weights are frozen inside: they take no gradient, and
    BatchNorm with running statistics is folded once, on entry, so that a weight changed inside is not seen.

    batch_statistics: every BatchNorm of the model normalises with the statistics of the batch; running statistics are
    neither used nor changed. Everything else (dropout, stochastic depth) is in eval mode. A masked neuron gives
    BatchNorm: its beta; convolution: its bias; mlp, heads: nothing to the projection that follows.

    On leaving, also by an exception, forward overrides, parameters, buffers and training flags are what they were.
    Raises ConfigError if the mask does not fit the sites, or if the model runs under a mask already.
    """
    if mask is not None:
        _check(sites, mask)
    if model in _under_mask:
        raise ConfigError("the model runs under a mask already: leave that context first, or use a copy of the model.")
    with ExitStack() as undo:
        undo.callback(_under_mask.discard, model)
        _under_mask.add(model)
        _eval_mode(model, undo)
        views: Views = []
        swaps: list[_Swap] = []
        overridden: set[nn.Module] = set()
        if mask is not None:
            _freeze(model, undo)
            holders = _holders(model)
            for i, site in enumerate(sites):
                module, weight = site_parameter(model, site.path, site.parameter)
                forward = _masked_forward(site, module, partial(views.__getitem__, i), batch_statistics)
                if forward is None:
                    swaps += [_Swap(i, module, *holder) for holder in holders[id(weight)]]
                else:
                    _override(module, forward, undo)
                    overridden.add(module)
        if batch_statistics:
            for module in model.modules():
                if isinstance(module, _BatchNorm) and module not in overridden:
                    _use_batch_statistics(module, undo)
        run = None
        if how.captured is not None and how.captured.reason is None and (how.captured.norms or not batch_statistics):
            run = program(how.captured, model, sites, mask, batch_statistics=batch_statistics, dtype=how.dtype)
        if mask is not None or run is not None or how.dtype is not None:
            device = next((p.device.type for p in model.parameters()), "cpu")
            modules = _by_modules(model.forward, sites, views, swaps, device, how.dtype)
            _override(model, _root_forward(modules, sites, mask, views, how.captured, run), undo)
        yield model


def prune_(model: nn.Module, sites: Sequence[Site], keep: Tensor) -> None:
    """Set the weights of the neurons that are not kept to zero, in place: what ``masked`` gives with a 0/1 mask.

    keep: bool, shape (total_neurons(sites),), on any device. BatchNorm: gamma = 0, beta kept; convolution: filter = 0,
    bias kept; mlp, heads: their columns of the linear layer = 0. Raises ConfigError if ``keep`` does not fit the sites.
    """
    if keep.dtype != torch.bool:
        raise ConfigError(f"keep must be a bool tensor, it is {keep.dtype}: pass for example mask > threshold.")
    _check(sites, keep, dtype=torch.bool)
    with torch.no_grad():
        for weight, gone in pruned_weights(model, sites, keep):
            weight.masked_fill_(gone, 0.0)


def pruned_weights(model: nn.Module, sites: Sequence[Site], keep: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(weight, which of its numbers belong to neurons that are not kept: bool, broadcasts over it) of every site."""
    for site in sites:
        module, weight = site_parameter(model, site.path, site.parameter)
        kept = keep[site.offset : site.offset + site.neurons].to(weight.device)
        yield weight, ~_spread(site, module, weight, kept)


def _check(sites: Sequence[Site], mask: Tensor, dtype: torch.dtype = torch.float32) -> None:
    total = total_neurons(sites)
    if mask.shape != (total,) or mask.dtype != dtype:
        raise ConfigError(
            f"the mask must be {dtype} of shape ({total},), it is {mask.dtype} of shape {tuple(mask.shape)}: make it "
            "with torch.ones(total_neurons(sites))."
        )
    offset = 0
    for site in sites:
        if site.offset != offset:
            raise ConfigError("the sites must be those of find_sites, all and in order: their offsets have gaps.")
        offset += site.neurons


# ---------------------------------------------------------------- putting on and taking off
@dataclass(frozen=True)
class _Swap:
    """A parameter that is multiplied by a site's mask during a forward; ``holder`` is a module that has it."""

    site: int
    module: nn.Module
    holder: nn.Module
    name: str


def _freeze(model: nn.Module, undo: ExitStack) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            undo.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)


def _eval_mode(model: nn.Module, undo: ExitStack) -> None:
    for module in model.modules():
        undo.callback(module.__dict__.__setitem__, "training", module.training)
        module.training = False
    # torch's attention fast path runs past the modules, and so past the masks.
    undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)


def _override(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    if "forward" in module.__dict__:
        undo.callback(module.__dict__.__setitem__, "forward", module.__dict__["forward"])
    else:
        undo.callback(module.__dict__.pop, "forward")
    module.__dict__["forward"] = forward


def _root_forward(
    modules: Callable[..., Any],
    sites: Sequence[Site],
    mask: Tensor | None,
    views: Views,
    captured: Captured | None,
    run: Callable[[Tensor], Tensor] | None,
) -> Callable[..., Any]:
    sizes = [site.neurons for site in sites]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if run is not None and captured is not None and len(args) == 1 and not kwargs and captured.takes(args[0]):
            return run(args[0])
        if mask is not None:
            # One split a forward: its backward is one cat, and the gradient of the mask is one tensor.
            views[:] = samples.split(mask, sizes)
        return modules(*args, **kwargs)

    return forward


def _by_modules(
    inner: Callable[..., Any],
    sites: Sequence[Site],
    views: Views,
    swaps: Sequence[_Swap],
    device: str,
    dtype: torch.dtype | None,
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Cloned: a forward may normalise its input in place, and others are to see it as it was.
        args = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)
        saved = [(swap.holder._parameters, swap.name, swap.holder._parameters[swap.name]) for swap in swaps]
        try:
            for swap, (parameters, name, weight) in zip(swaps, saved, strict=True):
                assert weight is not None
                vector = _spread(sites[swap.site], swap.module, weight, views[swap.site])
                # A plain tensor in the dictionary keeps the graph to the mask; state_dict is whole again below.
                parameters[name] = (weight * vector).to(weight.dtype)  # type: ignore[assignment]
            with products_in(dtype, device):
                return inner(*args, **kwargs)
        finally:
            for parameters, name, weight in saved:
                parameters[name] = weight

    return forward


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Who has each parameter, by its id: more than one module where weights are shared."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, name))
    return holders


def _spread(site: Site, module: nn.Module, weight: Tensor, vector: Tensor) -> Tensor:
    """``vector`` (neurons,) shaped so that it broadcasts over the weight of the site."""
    if site.kind in ("mlp", "heads"):
        return columns(site, vector)
    if isinstance(module, _ConvTransposeNd):  # weight: (in, out / groups, ...)
        per_group = vector.view(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1)
        return per_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    return vector.view(-1, *[1] * (weight.dim() - 1))


# ---------------------------------------------------------------- masked forwards
def _masked_forward(
    site: Site, module: nn.Module, mask: Callable[[], Tensor], batch_statistics: bool
) -> Callable[..., Any] | None:
    """The forward that replaces the module's own; None where the parameter has to be multiplied instead."""
    if site.functional:
        return None
    if site.kind == "conv":
        return _conv_forward(module, mask)
    if site.kind in ("mlp", "heads"):
        return _input_forward(site, module, mask)
    if not _plain_batch_norm(module):
        return None
    if batch_statistics or module.running_mean is None:
        return partial(_batch_statistics_forward, module, mask)
    return _frozen_forward(module, mask)


def _plain_batch_norm(module: nn.Module) -> bool:
    """Whether the module computes torch's own BatchNorm and nothing else."""
    own = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, _BatchNorm) and type(module).forward in own and "forward" not in module.__dict__


def _affine(x: Tensor, mask: Tensor, scale: Tensor, center: Tensor, shift: Tensor, channel_dim: int = 1) -> Tensor:
    return masked_affine(x, samples.cast(mask, scale.dtype), scale, center, shift, channel_dim=channel_dim)


def _ones(n: int, weight: Tensor) -> Tensor:
    """Ones in the precision that the ops compute in: float64 for float64 models, float32 for all others."""
    return torch.ones(n, dtype=_precision(weight), device=weight.device)


def _precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _frozen_forward(module: Any, mask: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """BatchNorm with running statistics: mask * gamma / sqrt(var + eps) * (x - mean) + beta."""
    kind = _precision(module.weight)
    center = module.running_mean.detach().to(kind, copy=True)
    scale = module.weight.detach().to(kind) * torch.rsqrt(module.running_var.detach().to(kind) + module.eps)
    shift = torch.zeros_like(scale) if module.bias is None else module.bias.detach().to(kind, copy=True)

    def forward(input: Tensor) -> Tensor:
        return _affine(input, mask(), scale, center, shift)

    return forward


def _batch_statistics_forward(module: Any, mask: Callable[[], Tensor] | None, input: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if mask is not None:  # in the precision of the mask: a product rounded to bfloat16 would lose small steps
        weight = mask() * weight
        bias = None if bias is None else bias.to(weight.dtype)
    return F.batch_norm(input, None, None, weight, bias, training=True, eps=module.eps)


def _conv_forward(module: Any, mask: Callable[[], Tensor]) -> Callable[..., Tensor]:
    """mask * (y - bias) + bias on the output of a convolution."""
    inner = module.forward
    ones = _ones(module.out_channels, module.weight)
    bias = torch.zeros_like(ones) if module.bias is None else module.bias.detach().to(ones.dtype, copy=True)
    batched = module.weight.dim()

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        output = inner(*args, **kwargs)
        if output.dim() < batched:
            return _affine(output.unsqueeze(0), mask(), ones, bias, bias).squeeze(0)
        return _affine(output, mask(), ones, bias, bias)

    return forward


def _input_forward(site: Site, module: Any, mask: Callable[[], Tensor]) -> Callable[..., Any]:
    """The linear layer on its input times the mask."""
    inner = module.forward
    ones = _ones(site.neurons * site.repeat, module.weight)
    zeros = torch.zeros_like(ones)

    def forward(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        vector = samples.repeated(mask(), site.repeat)
        if input.dim() == 1:  # one sample alone
            return inner(_affine(input[None], vector, ones, zeros, zeros, channel_dim=-1)[0], *args, **kwargs)
        return inner(_affine(input, vector, ones, zeros, zeros, channel_dim=-1), *args, **kwargs)

    return forward


def _use_batch_statistics(module: _BatchNorm, undo: ExitStack) -> None:
    """Statistics of the batch without a mask; a masked site has its own forward already."""
    if _plain_batch_norm(module):
        _override(module, partial(_batch_statistics_forward, module, None), undo)
        return
    # A subclass does more than normalise: it runs its own training mode, on copies of its running statistics.
    module.training = True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            undo.callback(module._buffers.__setitem__, name, buffer)
            module._buffers[name] = buffer.clone()
