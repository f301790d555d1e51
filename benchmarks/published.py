"""The stages of a whole run in plain torch, in two styles, as baselines of `mnp_fast.prune`.

published: float32, contiguous NCHW, a parameter of masks a layer, BatchNorm of the clean network in training mode while
masks are learned, weights not frozen. torch_compile: channels_last, autocast, weights frozen while masks are learned,
running statistics in the clean network, forward and loss compiled. Objectives, batches, rates and clipping are those of
mnp_fast's configuration; how many steps a stage makes is the caller's, so that two styles make equally many.
In favour of these styles, perturbations are not added to the pictures of masks and fine-tuning, no weight takes a
gradient while perturbations are made, and the answers that fine-tuning learns from are there before it is timed.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers import reference, rewrite, spread, use_batch_statistics_
from benchmarks.providers import (
    DECAY,
    PENALTY,
    RATE,
    autocast,
    frozen,
    in_channels_last,
    relative_errors,
    split,
    to_channels_last,
)
from mnp_fast import PruneConfig
from mnp_fast.data import DefenceSet, logits_of
from mnp_fast.objectives import repair_loss
from mnp_fast.optimize import recalibrate_
from mnp_fast.sites import Site, site_parameter

_CLIP = 1.0
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """Steps of one kind. period: steps after which the shapes of batches repeat; count: steps of the whole run."""

    stage: str
    step: Callable[[], None]
    period: int
    count: int


@dataclass(frozen=True)
class Timed:
    """Seconds of the steps of a part, and those that the first period took beyond (compiling); steps really run."""

    seconds: float
    compile_s: float
    measured: int


@dataclass(frozen=True)
class Counts:
    """Steps of each kind in one run of mnp_fast.prune.

    suppress: of ascent; search_evaluations, weigh_evaluations: of the suppressed network, or the network itself, on all
    pictures; search, weigh, perturb: of the perturbations that find the class (recalibrated statistics, half batches),
    for evidence (batch statistics) and for repair (as in the search); masks: of mask learning; plain: evaluations of
    prune sets on learning and held-back pictures; finetune: of fine-tuning.
    """

    suppress: int
    search_evaluations: int
    weigh_evaluations: int
    search: int
    weigh: int
    perturb: int
    masks: int
    plain: int
    finetune: int


class Stages:
    """The stages of one style. Each `Part` may be run once ``suppress`` has made ``self.exposed``."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        magnitude: Tensor,
        learning: DefenceSet,
        held: DefenceSet,
        config: PruneConfig,
        dtype: torch.dtype,
        *,
        compiled: bool,
    ) -> None:
        self.model, self.sites, self.magnitude, self.config = model, sites, magnitude, config
        self.learning, self.held, self.dtype, self.compiled = learning, held, dtype, compiled
        self.device = magnitude.device
        self.exposed = self._copy(model)
        self.mask_gradient: Tensor | None = None
        self.mask_loss = math.nan

    def parts(self, counts: Counts) -> Iterator[Part]:
        """All parts in order; a later one is made only once the one before has run."""
        yield self._suppress(counts.suppress)
        # One evaluation of all pictures.
        exposed = use_batch_statistics_(copy.deepcopy(self.exposed))
        yield Part("weigh", self._evaluation(exposed, [self.learning, self.held]), 1, counts.weigh_evaluations)
        self.exposed.eval()
        recalibrate_(self.exposed, self.learning, self.config)
        searched = copy.deepcopy(self.exposed)
        evaluate = self._evaluation(searched, [self.learning, self.held])
        yield Part("search", evaluate, 1, counts.search_evaluations)
        yield self._perturb("search", searched, counts.search, self._half_batch)
        del searched, evaluate
        yield self._perturb("weigh", exposed, counts.weigh, self.config.batch_size)
        del exposed
        yield self._perturb("perturb", copy.deepcopy(self.exposed), counts.perturb, self._half_batch)
        yield self._masks(counts.masks)
        self.masked.eval()
        yield Part("select", self._evaluation(self.masked, [self.learning, self.held]), 1, counts.plain)
        yield self._finetune(counts.finetune)

    # ------------------------------------------------------------ stages
    def _suppress(self, count: int) -> Part:
        """Ascent on the clean loss in steps of one length, batch statistics in every BatchNorm."""
        net = use_batch_statistics_(self.exposed)
        parameters = [p for p in net.parameters() if p.is_floating_point()]
        optimizer = torch.optim.SGD(
            parameters, lr=self.config.suppression_rate, momentum=DECAY, weight_decay=self.config.weight_decay
        )
        loss_of = self._loss(net)
        batches, period = self._batches(self.config.batch_size)

        def step() -> None:
            images, labels = next(batches)
            optimizer.zero_grad()
            (-loss_of(images, labels)).backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            length = torch.nn.utils.get_total_norm(gradients).clamp_min(1e-12)
            torch._foreach_div_(gradients, length)
            optimizer.step()

        return Part("suppress", step, period, count)

    def _perturb(self, stage: str, net: nn.Module, count: int, batch_size: int) -> Part:
        """Gradient steps on one universal perturbation."""
        net.requires_grad_(False)
        loss_of = self._loss(net)
        batches, period = self._batches(batch_size)
        perturbation = torch.zeros_like(self.learning.images[:1])

        def step() -> None:
            images, labels = next(batches)
            moving = perturbation.detach().requires_grad_()
            loss_of(images + moving, torch.zeros_like(labels)).backward()
            assert moving.grad is not None
            perturbation.sub_(1e-3 * moving.grad / moving.grad.norm().clamp_min(1e-12))

        return Part(stage, step, period, count)

    def _masks(self, count: int) -> Part:
        """Projected SGD on the masks of both networks; ``self.masked`` and ``self.masked_exposed`` afterwards."""
        flat = torch.ones_like(self.magnitude)
        masks = split(flat, self.sites)
        nets = [
            rewrite(net, self.sites, masks, on_weights=not self.compiled).eval() for net in (self.model, self.exposed)
        ]
        self.masked, self.masked_exposed = nets
        if self.compiled:
            for net in nets:
                frozen(net, masks)
        else:
            use_batch_statistics_(self.masked)
        losses = [self._loss(net) for net in nets]
        batches, period = self._batches(self.config.batch_size)
        alpha = self.config.alpha
        optimizer = torch.optim.SGD(masks, lr=RATE, momentum=DECAY)
        penalties = self.magnitude.split([site.neurons for site in self.sites])
        momentum, pull = torch.zeros_like(flat), PENALTY * self.magnitude

        def published() -> None:
            images, labels = next(batches)
            for net in nets:
                net.zero_grad()
            loss = alpha * losses[1](images, labels).sqrt() + (1 - alpha) * losses[0](images, labels)
            penalty = sum((mask * weight).sum() for mask, weight in zip(masks, penalties, strict=True))
            (loss + PENALTY * penalty).backward()
            gradient = torch.cat([mask.grad for mask in masks if mask.grad is not None]) - pull
            self._remember(images, labels, loss, gradient)
            optimizer.step()
            with torch.no_grad():
                for mask in masks:
                    mask.clamp_(0.0, 1.0)

        def tuned() -> None:
            images, labels = next(batches)
            loss = alpha * losses[1](images, labels).sqrt() + (1 - alpha) * losses[0](images, labels)
            gradient = torch.cat(torch.autograd.grad(loss, masks))
            self._remember(images, labels, loss, gradient)
            with torch.no_grad():
                momentum.mul_(DECAY).add_(gradient).add_(pull)
                flat.sub_(RATE * momentum).clamp_(0.0, 1.0)

        return Part("masks", tuned if self.compiled else published, period, count)

    def _evaluation(self, net: nn.Module, sets: Sequence[DefenceSet]) -> Callable[[], None]:
        run = torch.compile(net) if self.compiled else net

        def evaluate() -> None:
            with torch.no_grad(), autocast(self.dtype, self.device):
                for data in sets:
                    for images, _ in data.batches(self.config.batch_size, device=self.device):
                        logits_of(run(self._images(images))).float().cpu()

        return evaluate

    def _finetune(self, count: int) -> Part:
        """Distillation from the clean network on frozen statistics; one neuron in fifty held at zero."""
        net, teacher = self._copy(self.model), self._copy(self.model).requires_grad_(False)
        keep = torch.arange(len(self.magnitude), device=self.device) % 50 != 0
        weights = [site_parameter(net, site.path, site.parameter)[1] for site in self.sites]
        kept = [
            spread(site, weight, keep[site.offset : site.offset + site.neurons])
            for site, weight in zip(self.sites, weights, strict=True)
        ]
        parameters = list(net.parameters())
        # Batches of rows: what the teacher says of a picture is asked once.
        rows = torch.arange(len(self.learning))
        batches, period = self._batches(self._half_batch, DefenceSet(self.learning.images, rows))
        with torch.no_grad(), autocast(self.dtype, self.device):
            parts = self.learning.batches(self.config.batch_size, device=self.device)
            answers = torch.cat([logits_of(teacher(self._images(images))) for images, _ in parts])
        right = self.learning.labels.to(self.device)
        optimizer = torch.optim.SGD(
            parameters, lr=self.config.finetune_rate, momentum=DECAY, weight_decay=self.config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, count))

        def loss_of(images: Tensor, soft: Tensor, labels: Tensor) -> Tensor:
            with autocast(self.dtype, self.device):
                return repair_loss(logits_of(net(images)), soft, labels, self.config.distillation)

        run = torch.compile(loss_of) if self.compiled else loss_of

        def step() -> None:
            images, rows = next(batches)
            optimizer.zero_grad()
            run(images, answers[rows], right[rows]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for weight, mask in zip(weights, kept, strict=True):
                    weight.mul_(mask)

        return Part("fine-tune", step, period, count)

    # ------------------------------------------------------------ the check
    def _remember(self, images: Tensor, labels: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Keep the first step of mask learning, whose masks are all one."""
        if self.mask_gradient is None:
            self.mask_gradient, self.mask_loss = gradient.detach().clone(), float(loss.detach())
            self.first_batch = images, labels

    def errors(self) -> tuple[float, float]:
        """(relative error of the loss, of the gradient in L2) of the first step of mask learning."""
        assert self.mask_gradient is not None
        expected = mask_objective(
            self.model, self.exposed, self.sites, *self.first_batch, self.config.alpha, not self.compiled
        )
        return relative_errors(self.mask_loss, self.mask_gradient, *expected)

    # ------------------------------------------------------------ pieces
    @property
    def _half_batch(self) -> int:
        return max(2, self.config.batch_size // 2)

    def _copy(self, model: nn.Module) -> nn.Module:
        net = copy.deepcopy(model).eval().requires_grad_(True)
        return to_channels_last(net) if self.compiled else net

    def _images(self, images: Tensor) -> Tensor:
        return in_channels_last(images) if self.compiled else images

    def _batches(self, size: int, data: DefenceSet | None = None) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
        """Shuffled batches without end, of the learning pictures or of ``data``, and how many a pass has."""
        given = self.learning if data is None else data
        generator = torch.Generator().manual_seed(0)
        period = len(list(given.batches(size, generator)))

        def endless() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                for images, labels in given.batches(size, generator, self.device):
                    yield self._images(images), labels

        return endless(), period

    def _loss(self, net: nn.Module) -> Loss:
        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            with autocast(self.dtype, self.device):
                return F.cross_entropy(logits_of(net(images)).float(), labels)

        return torch.compile(loss_of) if self.compiled else loss_of


def mask_objective(
    model: nn.Module,
    exposed: nn.Module,
    sites: Sequence[Site],
    images: Tensor,
    labels: Tensor,
    alpha: float,
    batch_statistics: bool,
) -> tuple[float, Tensor]:
    """(loss, gradient) of mask learning where all masks are one, by the reference.

    batch_statistics: of the clean network; the suppressed one has its own.
    """
    ones = torch.ones(sum(site.neurons for site in sites), device=images.device)
    terms = [
        reference(net, sites, ones, images, labels, batch_statistics=mode)
        for net, mode in ((exposed, False), (model, batch_statistics))
    ]
    (loss, gradient), (clean_loss, clean_gradient) = terms
    root = math.sqrt(loss)
    return alpha * root + (1 - alpha) * clean_loss, alpha / (2 * root) * gradient + (1 - alpha) * clean_gradient


def timed(part: Part, device: torch.device, *, sample: int | None, compiled: bool) -> Timed:
    """Run a part: all its steps (sample None), or one period to warm up and then at least ``sample`` steps.

    Sampled steps come in whole periods, and their mean stands for all ``part.count`` steps.
    """
    if part.count == 0:
        return Timed(0.0, 0.0, 0)
    wanted = part.count if sample is None else part.period * (1 + math.ceil(sample / part.period))
    times = []
    for _ in itertools.repeat(None, wanted):
        start = time.perf_counter()
        part.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    first, rest = times[: part.period], times[part.period :]
    if not rest:  # fewer steps than batches in a pass: nothing tells compiling and computing apart
        return Timed(sum(times), 0.0, len(times))
    mean = sum(rest) / len(rest)
    compile_s = max(0.0, sum(first) - mean * len(first)) if compiled else 0.0
    seconds = sum(times) - compile_s if sample is None else mean * part.count
    return Timed(seconds, compile_s, len(times))
