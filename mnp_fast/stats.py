"""Statistics of the neurons: their magnitude, their saliency to first order and exactly, and how the two agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from mnp_fast import workers
from mnp_fast.data import logits_of
from mnp_fast.errors import ConfigError, DataError
from mnp_fast.graph.capture import capture
from mnp_fast.graph.program import Program
from mnp_fast.graph.rewrite import program
from mnp_fast.masked import MODULES, Execution, masked
from mnp_fast.memory import kept
from mnp_fast.ops import channel_magnitude, samples
from mnp_fast.ops.op_channel_magnitude import DTYPES
from mnp_fast.sites import Site, site_names, site_parameter, total_neurons, undisturbed
from mnp_fast.walk import Walk, losses_of

_BUDGET = 256 << 20
"""Bytes that the values of all removals that run at once may take."""

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


# ---------------------------------------------------------------- saliency
def saliency(
    model: nn.Module, sites: Sequence[Site], images: Tensor, labels: Tensor, *, how: Execution = MODULES
) -> tuple[Tensor, Tensor]:
    """(taylor, fisher) of every neuron, from one forward and backward pass under masks that are all one.

    With L_n the cross-entropy of picture n: taylor_i = mean_n dL_n/dm_i, signed; less it is what the clean loss changes
    by, to first order, when the neuron is removed (arXiv 1611.06440). fisher_i = mean_n (dL_n/dm_i)^2, twice the
    estimate of that change in arXiv 1801.05787.

    images: (b, ...), labels: (b,) int64, on the model's device. how: a captured trace is faster, and tells pictures
    apart wherever it masks. One backward pass a picture is run where they cannot be told apart: by modules, where a
    weight is multiplied (nn.MultiheadAttention) or windows are folded into dimension 0; and where pictures depend on
    each other (BatchNorm without running statistics).

    Returns float32, (total_neurons(sites),) each, without gradient. Raises DataError for labels that do not fit.
    """
    _check_labels(images, labels)
    mask = torch.ones(total_neurons(sites), device=images.device, requires_grad=True)
    with _under(model, sites, mask, how, gradients=True) as net:
        run = _program(model, sites, images, how, packed=False, joined=True)
        passes: list[_Pass] = []
        if run is not None and run.independent:
            parts = run.parts(images)
            chunks = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
            passes = workers.side_by_side(
                [partial(_Pass, run.run, mask.detach().clone().requires_grad_(), sites, *chunk) for chunk in chunks]
            )
        elif run is None and not any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules()):
            passes = [_Pass(lambda x, _: logits_of(net(x)), mask, sites, images, labels)]
        rows = _by_picture(passes, sites, lambda: None if run is None else Walk(run, sites, images[:1]))
        if rows is None:
            samples.watch(mask, None)
            rows = _one_by_one(logits_of(net(images)), labels, mask)
    return rows.mean(0), rows.square_().mean(0)


class _Pass:
    """A forward and a backward pass.

    gradient: of the summed losses, (neurons,). calls: for each site, the shape of what was masked and the gradient of
    the mask along its dimension 0.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        mask: Tensor,
        sites: Sequence[Site],
        images: Tensor,
        labels: Tensor,
    ) -> None:
        self.pictures = len(images)
        self.calls: list[list[tuple[torch.Size, Tensor]]] = [[] for _ in sites]
        samples.watch(mask, lambda site, shape, rows: self.calls[site].append((shape, rows)))
        loss = losses_of(run(images, mask), labels).sum()
        (self.gradient,) = torch.autograd.grad(loss, mask)

    def by_picture(self, number: int, site: Site, order: Callable[[int], bool | None]) -> Tensor | None:
        """Gradient of the site's mask, (pictures, neurons). order: of the rows of a picture, together or not."""
        total = self.gradient.new_zeros(self.pictures, site.neurons)
        for shape, rows in self.calls[number]:
            # Where another dimension could be that of the pictures, dimension 0 may be of equal length by chance.
            certain = site.kind in ("batch_norm", "conv") or all(size % self.pictures for size in shape[1:-1])
            if self.pictures == 1:
                total += rows.sum(0)
            elif certain and len(rows) == self.pictures:
                total += rows
            elif (together := order(number)) is None or len(rows) % self.pictures:
                return None
            else:
                total += rows.unflatten(0, (self.pictures, -1) if together else (-1, self.pictures)).sum(int(together))
        return total


def _by_picture(passes: Sequence[_Pass], sites: Sequence[Site], walk: Callable[[], Walk | None]) -> Tensor | None:
    """Gradients of all masks by picture, (pictures, neurons); None where the passes do not tell."""
    walks: list[Walk | None] = []

    def order(number: int) -> bool | None:
        if not walks:
            walks.append(walk())
        return None if walks[0] is None else walks[0].order(number)

    parts, wrong = [], []
    for one in passes:
        found = [one.by_picture(number, site, order) for number, site in enumerate(sites)]
        whole = [rows for rows in found if rows is not None]
        if len(whole) < len(found):
            return None
        parts.append(torch.cat(whole, 1))
        # What an op does not hand on, such as a mask that multiplies a weight, is missing from the sum.
        missing = (parts[-1].sum(0) - one.gradient).split([site.neurons for site in sites])
        scale = parts[-1].abs().sum(0).split([site.neurons for site in sites])
        wrong += [a.norm() > 1e-4 * b.norm() for a, b in zip(missing, scale, strict=True)]
    return None if not parts or bool(torch.stack(wrong).any()) else torch.cat(parts)


def _one_by_one(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The same by one backward pass a picture."""
    losses = losses_of(logits, labels)
    return torch.stack([torch.autograd.grad(loss, mask, retain_graph=True)[0] for loss in losses])


def exact_saliency(
    model: nn.Module,
    sites: Sequence[Site],
    images: Tensor,
    labels: Tensor,
    neurons: Tensor,
    *,
    how: Execution | None = None,
) -> Tensor:
    """Change of the mean cross-entropy of the pictures when each of the neurons alone is removed (mask 0).

    On a captured trace all that precedes a neuron is run once, and what follows for many removals at once; by modules
    it is one forward a neuron. None captures the model, which takes some seconds.

    images: (b, ...), labels: (b,) int64, on the model's device. neurons: (k,) int64, entries of the flat mask. Returns
    float32, (k,). Raises DataError for labels and ConfigError for neurons that do not fit.
    """
    _check_labels(images, labels)
    total = total_neurons(sites)
    if neurons.dtype != torch.int64 or neurons.dim() != 1:
        raise ConfigError(f"neurons must be int64 of shape (k,), they are {neurons.dtype} of {tuple(neurons.shape)}.")
    if len(neurons) and not 0 <= int(neurons.min()) <= int(neurons.max()) < total:
        raise ConfigError(
            f"neurons are numbered from 0 to {total - 1}, these go from {int(neurons.min())} to {int(neurons.max())}."
        )
    if how is None:
        how = Execution(capture(model, sites, images))
    mask = torch.ones(total, device=images.device)
    chosen, places = neurons.to(images.device).unique(return_inverse=True)
    with kept(), _under(model, sites, mask, how, gradients=False) as net:
        run = _program(model, sites, images, how, packed=True, joined=False)
        if run is not None and run.independent:
            changes = _removed(run, sites, images, labels, chosen)
        else:
            before = losses_of(logits_of(net(images)), labels).mean()
            changes = torch.zeros(len(chosen), dtype=before.dtype, device=before.device)
            for i, neuron in enumerate(chosen.tolist()):
                mask[neuron] = 0.0
                changes[i] = losses_of(logits_of(net(images)), labels).mean() - before
                mask[neuron] = 1.0
    return changes[places].float()


def _removed(run: Program, sites: Sequence[Site], images: Tensor, labels: Tensor, neurons: Tensor) -> Tensor:
    """Change of the mean loss without each neuron, in the order of ``neurons``, which is ascending."""
    chosen = {
        number: (part - site.offset).tolist()
        for number, site in enumerate(sites)
        if len(part := neurons[(neurons >= site.offset) & (neurons < site.offset + site.neurons)])
    }
    walk = Walk(run, sites, images[:1])
    side = run.parts(images)
    budget = _BUDGET / side
    at_once = max(2, int(budget / walk.heavy[0]))
    parts = min(len(images) // 2, side * math.ceil(len(images) / (side * at_once)))
    pieces = [
        partial(walk.losses, *chunk, chosen, budget)
        for chunk in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    ]
    found = [loss for start in range(0, parts, side) for loss in workers.side_by_side(pieces[start : start + side])]
    changes = sum(
        torch.cat([without[number] for number in chosen] or [clean.new_empty(0)]) - clean for clean, without in found
    )
    assert isinstance(changes, Tensor)
    return changes / len(images)


@contextmanager
def _under(
    model: nn.Module, sites: Sequence[Site], mask: Tensor, how: Execution, *, gradients: bool
) -> Iterator[Callable[[Tensor], Any]]:
    """The model by its modules under the mask, as it was after."""
    modules = Execution(dtype=how.dtype)
    with undisturbed(model), torch.set_grad_enabled(gradients), masked(model, sites, mask, how=modules):
        yield model


def _program(
    model: nn.Module, sites: Sequence[Site], images: Tensor, how: Execution, *, packed: bool, joined: bool
) -> Program | None:
    """The captured trace with the model's weights, where it stands for these images."""
    if how.captured is None or not how.captured.takes(images):
        return None
    ones = torch.ones(total_neurons(sites), device=images.device)
    return program(
        how.captured, model, sites, ones, batch_statistics=False, dtype=how.dtype, packed=packed, joined=joined
    )


def _check_labels(images: Tensor, labels: Tensor) -> None:
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or len(labels) == 0:
        raise DataError(
            f"the labels must be int64 and one a picture, they are {labels.dtype} of shape {tuple(labels.shape)} for "
            f"{len(images)} pictures."
        )
    if int(labels.min()) < 0:
        raise DataError(f"the labels go down to {int(labels.min())}: number the classes from 0.")


# ---------------------------------------------------------------- agreement
def rank_correlation(magnitude: Tensor, saliency: Tensor, sites: Sequence[Site]) -> dict[str, float]:
    """Spearman's rho of the two in every site, by its name (`site_names`).

    magnitude, saliency: (total_neurons(sites),), taken as they are: give |taylor| where its sign does not matter. Equal
    values share the mean of their ranks; rho is 0 where one of the two is constant. ConfigError for other shapes.
    """
    total = total_neurons(sites)
    if magnitude.shape != (total,) or saliency.shape != (total,):
        raise ConfigError(
            f"magnitude and saliency must have shape ({total},), they have {tuple(magnitude.shape)} and "
            f"{tuple(saliency.shape)}."
        )
    sizes = torch.tensor([site.neurons for site in sites])
    owner = torch.arange(len(sites)).repeat_interleave(sizes)

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(len(sites), dtype=torch.float64).index_add_(0, owner, values)

    ranks = [_ranks(values.detach().cpu(), owner) for values in (magnitude, saliency)]
    a, b = (rank - (sums(rank) / sizes)[owner] for rank in ranks)
    spread = (sums(a * a) * sums(b * b)).sqrt()
    rho = torch.where(spread > 0, sums(a * b) / spread, 0.0).clamp(-1, 1)
    return dict(zip(site_names(sites), rho.tolist(), strict=True))


def _ranks(values: Tensor, owner: Tensor) -> Tensor:
    """Rank of each value among all of its owner, up to a constant of the owner; equal values have their mean rank."""
    order = values.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    ordered = values[order]
    # The owners are in order and every one's values are together: sorted, they stand where they stood.
    new = (ordered[1:] != ordered[:-1]) | (owner[1:] != owner[:-1])
    tie = torch.cat([torch.zeros(min(1, len(values)), dtype=torch.int64), new.cumsum(0)])
    places = torch.arange(len(values), dtype=torch.float64)
    mean = torch.zeros(len(values), dtype=torch.float64).index_add_(0, tie, places) / tie.bincount(
        minlength=len(values)
    ).clamp_min(1)
    return torch.empty(len(values), dtype=torch.float64).index_copy_(0, order, mean[tie])
