"""A second way to expose a backdoor: single waves, of which one phase leads into a class and another does not.

Clean suppression destroys some backdoors (SIG, arXiv 1902.11237: docs/decisions.md), so these are looked for on the
model itself. Any wave that is strong enough leads a convolutional network into some class, but whatever its phase,
since such networks hardly notice a shift. A trigger was learned in one place: there the phase decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import MODULES, Execution, masked
from mnp_fast.optimize import predict
from mnp_fast.progress import Progress
from mnp_fast.sites import Site, total_neurons

_FEWEST, _PERIODS = 3, 8  # at least along one side, at most along either
_QUARTERS, _EIGHTHS = 4, 8  # phases, when all waves are tried and when the best are looked at again
_FEW, _MANY = 12, 120  # pictures, likewise
_BEST = 4


@dataclass(frozen=True)
class Wave:
    """target: the class whose share depends most on the phase. contrast: its share at the best phase less that at the
    worst, of clean pictures of other classes, in [-1, 1]; the phases are chosen on other pictures than the shares are
    taken from. picture: the wave at its best phase, in the shape of a picture, float32. waved: pictures that the model
    was asked about."""

    target: int
    contrast: float
    picture: Tensor
    waved: int


def find_wave(
    model: nn.Module,
    sites: Sequence[Site],
    data: DefenceSet,
    size: float,
    config: PruneConfig,
    progress: Progress,
    how: Execution = MODULES,
) -> Wave | None:
    """The wave whose phase matters most to ``model``, as it came, on clean pictures (n, channels, height, width).

    sites: those of the model. size: L2 norm of a wave over the mean L2 norm of the pictures' deviation from the mean of
    each channel. Every channel has its share by its own deviation. None where pictures have no height and width or are
    smaller than 12 pixels, and where there are fewer than eight of them.
    """
    if data.images.dim() != 4 or min(data.images.shape[-2:]) < 4 * _FEWEST or len(data) < 8:
        return None
    deviation = data.deviation()
    channels = deviation.square().mean([0, 2, 3]).sqrt()
    radius = size * float(deviation.flatten(1).norm(dim=1).mean())
    # By its own numbers: what comes after draws the same with and without this search.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    pictures = data.subset(order[: min(_MANY, len(data))])
    few = pictures.subset(torch.arange(min(_FEW, len(pictures))))

    def wave(mode: tuple[int, int], phase: float) -> Tensor:
        plane = _plane(mode, phase, data.images.shape[-2], data.images.shape[-1]).to(channels)
        found = channels[:, None, None] * plane
        return found * (radius / found.norm().clamp_min(1e-12))

    modes = list(_modes(data.images.shape[-2], data.images.shape[-1]))
    progress.stage("waves", len(modes) + _BEST)
    # All ones: under a mask weights are frozen, which is what forwards are fastest with.
    ones = torch.ones(total_neurons(sites), device=data.images.device)
    with masked(model, sites, ones, how=how):
        contrasts = []
        for mode in modes:
            answers = _into(model, few, [wave(mode, i / _QUARTERS) for i in range(_QUARTERS)], config)
            shares = _shares(answers, few.labels)
            contrasts.append(float((shares.amax(0) - shares.amin(0)).max()))
            progress.update(1)
        best: Wave | None = None
        looked_at = torch.tensor(contrasts).argsort(descending=True, stable=True)[:_BEST].tolist()
        waved = len(modes) * _QUARTERS * len(few) + len(looked_at) * _EIGHTHS * len(pictures)
        for number in looked_at:
            waves = [wave(modes[number], i / _EIGHTHS) for i in range(_EIGHTHS)]
            answers = torch.cat([_into(model, pictures, [one], config) for one in waves])
            one, other = (_shares(answers[:, part::2], pictures.labels[part::2]) for part in range(2))
            contrast = (_contrast(one, other) + _contrast(other, one)) / 2
            target = int(contrast.argmax())
            if best is None or float(contrast[target]) > best.contrast:
                shares = (one + other)[:, target]
                # With its neighbours: of several that lead there altogether the middle one.
                phase = int((2 * shares + shares.roll(1) + shares.roll(-1)).argmax())
                best = Wave(target, float(contrast[target]), waves[phase], waved)
            progress.update(1)
    return best


def _modes(height: int, width: int) -> Iterator[tuple[int, int]]:
    """(periods down, periods across), one of each pair that differs by sign.

    Left out are those that come back in step with a network's strides, which see them in one phase only: clean networks
    then mind the phase too (up to .7 at 4 and 8 periods of 32 pixels); and those of one and two periods, which is what
    centred objects are made of (a clean network on digits of 8x8 pixels was suspicious).
    """
    down, across = (min(_PERIODS, side // 4) for side in (height, width))
    strides = [2 ** int(math.log2(side / 4)) for side in (height, width)]
    for y in range(-down, down + 1):
        for x in range(across + 1):
            in_step = (y * strides[0]) % height == 0 and (x * strides[1]) % width == 0
            if (x > 0 or y > 0) and max(abs(y), x) >= _FEWEST and not in_step:
                yield y, x


def _plane(mode: tuple[int, int], phase: float, height: int, width: int) -> Tensor:
    """(height, width): cos(2 pi (periods + phase)), the phase in turns."""
    turns = mode[0] * torch.arange(height)[:, None] / height + mode[1] * torch.arange(width) / width
    return torch.cos(2 * math.pi * (turns + phase))


def _into(model: nn.Module, pictures: DefenceSet, waves: Sequence[Tensor], config: PruneConfig) -> Tensor:
    """(waves, n, classes) bool: the class that each picture goes to with each wave. All are in memory at once."""
    waved = DefenceSet(torch.cat([pictures.images + wave for wave in waves]), pictures.labels.repeat(len(waves)))
    logits = predict(model, waved, config.batch_size, pictures.images.device)
    return (logits == logits.amax(1, keepdim=True)).view(len(waves), len(pictures), -1)


def _shares(into: Tensor, labels: Tensor) -> Tensor:
    """(phases, classes): of the pictures of other classes those that go to each. into: (phases, n, classes) bool."""
    others = torch.ones(into.shape[1:]).scatter_(1, labels.cpu()[:, None], 0.0)
    return (into * others).sum(1) / others.sum(0).clamp_min(1.0)


def _contrast(choosing: Tensor, measuring: Tensor) -> Tensor:
    """(classes,): share at the phase that is best by one half of the pictures, less that at the worst, by the other."""
    best, worst = choosing.argmax(0, keepdim=True), choosing.argmin(0, keepdim=True)
    return (measuring.gather(0, best) - measuring.gather(0, worst)).flatten()
