"""The loops: clean suppression, universal perturbations, learning of the masks, fine-tuning of the pruned model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet, logits_of
from mnp_fast.errors import ModelError
from mnp_fast.masked import MODULES, Execution, masked, prune_, pruned_weights
from mnp_fast.objectives import eliminate, expose, preserve, pull, repair_loss
from mnp_fast.ops import mask_step_
from mnp_fast.progress import Progress
from mnp_fast.replay import Replayed
from mnp_fast.sites import Site

_MOMENTUM = 0.9
_CLIP = 1.0
_HALF_SUPPRESSED = 0.6
_PERTURBATION_STEP = 0.2  # of the size; they begin at half of that
_WINDOW = 512
"""Pictures over which suppression judges its own pace, so that it does not depend on the size of the defence set."""


@dataclass
class Trace:
    """What a stage went through: one value a window (suppression) or a pass (the others)."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)


def suppress_(
    model: nn.Module,
    data: DefenceSet,
    config: PruneConfig,
    generator: torch.Generator,
    progress: Progress,
    how: Execution = MODULES,
) -> Trace:
    """Clean suppression, in place: ascend on the clean loss until accuracy falls to a share of what it was.

    Batch statistics in every BatchNorm, dropout off: with running statistics the backdoor went with the clean function.
    Steps have a fixed length (the gradient is normalised), since gradients grow a thousandfold on the way. The length
    adapts: longer while accuracy hardly moves, shorter where it falls at once, and a window in which it collapsed is
    taken back, since a rate that is too high destroys the backdoor too (docs/decisions.md).

    model: on the device of the data, its parameters trainable. Raises ModelError if accuracy hardly falls.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    momenta = [torch.zeros_like(p) for p in parameters]
    trace, rate, first = Trace(), config.suppression_rate, 0.0
    # With few classes a model that answers one class only is still right this often.
    commonest = 1.1 * float(data.labels.bincount().max()) / len(data)
    windows = config.suppression_epochs * len(windows_of(math.ceil(len(data) / config.batch_size), config.batch_size))
    progress.stage("suppress", None)
    passes = _windows(data, config.batch_size, generator)
    with masked(model, (), None, batch_statistics=True, how=how):
        for number in range(windows):
            before = [p.detach().clone() for p in (*parameters, *momenta)]
            loss, accuracy = _ascend(model, next(passes), parameters, momenta, rate, config.weight_decay)
            finite = math.isfinite(loss) and all(bool(p.isfinite().all()) for p in parameters)
            if finite:
                first = first or max(accuracy, 1.0 / 512)
            fall = (trace.accuracy[-1] if trace.accuracy else accuracy) - accuracy
            # Numbers that are not finite and a fall of half in one window both mean steps that are too long.
            if not finite or (fall > first / 2 and rate > config.suppression_rate / 16):
                for p, old in zip((*parameters, *momenta), before, strict=True):
                    p.detach().copy_(old)
                rate /= 4
                continue
            trace.loss.append(loss)
            trace.accuracy.append(accuracy)
            trace.rate.append(rate)
            progress.update(1, loss=loss, accuracy=accuracy)
            # A loader of nearly one class alone: what is as good as it was at first is not suppressed.
            if accuracy <= max(config.suppression_stop * first, min(commonest, _HALF_SUPPRESSED * first)):
                return trace
            if fall < 0.02 * first and number:
                rate = min(rate * 1.15, 8 * config.suppression_rate)
            elif fall > 0.12 * first:
                rate /= 1.5
    # Half suppressed still shows and orders something; not suppressed at all shows nothing.
    if trace.accuracy and trace.accuracy[-1] <= _HALF_SUPPRESSED * first:
        return trace
    raise ModelError(
        f"clean suppression did not bring the accuracy down in {config.suppression_epochs} passes (it began at "
        f"{first:.2f} and ended at {accuracy:.2f}); raise suppression_rate or suppression_epochs, and give pictures of "
        "all classes in like numbers"
    )


def perturb(
    network: nn.Module,
    targets: Sequence[int],
    sites: Sequence[Site],
    data: DefenceSet,
    config: PruneConfig,
    generator: torch.Generator,
    progress: Progress,
    how: Execution = MODULES,
    *,
    size: float,
    steps: int,
    start: Tensor | None = None,
    batch_statistics: bool = False,
) -> Tensor:
    """Universal perturbations (Moosavi-Dezfooli et al., arXiv 1610.08401), one for each class of ``targets``.

    Each is one picture that is added to all: normalised gradient steps from a random start, kept within a ball. What
    pulls every picture into a class at once does what the trigger does; the suppressed model, whose clean function is
    gone, shows little else, and in the model itself it is near the trigger of a class that is known. With batch
    statistics the norms take out much of what all pictures share, triggers too: what pulls even so is evidence. With
    fixed ones (`recalibrate_`) triggers work in full (docs/decisions.md), and half a batch is enough for a step.

    size: L2 norm over the mean L2 norm of the pictures' deviation from the mean of each channel. start: where to go on
    from, as this returns it; without, each starts from noise. Returns
    (len(targets), ...) float32, each in the shape of a picture, on the device of the data.
    """
    radius = size * float(data.deviation().flatten(1).norm(dim=1).mean())
    ones = torch.ones(sum(site.neurons for site in sites), device=data.images.device)

    def moved(images: Tensor, wanted: Tensor, perturbation: Tensor) -> tuple[Tensor]:
        perturbation = perturbation.detach().requires_grad_()
        loss = pull(logits_of(network(images + perturbation)), wanted)
        (gradient,) = torch.autograd.grad(loss, perturbation)
        with torch.no_grad():
            further = perturbation - gradient * (_PERTURBATION_STEP * radius / gradient.norm().clamp_min(1e-12))
            return (further * (radius / further.norm().clamp_min(1e-12)).clamp_max(1.0),)

    move = Replayed(moved, (), how.recorder)
    found = []
    with masked(network, sites, ones, batch_statistics=batch_statistics, how=how):
        for number, target in enumerate(targets):
            pictures = of_other_classes(data, target)
            batch_size = config.batch_size if batch_statistics else _half_batch(config)
            batches = _endless(partial(pictures.batches, batch_size, generator))
            if start is None:
                # Drawn on the CPU: the same numbers whatever the device.
                noise = torch.randn(data.images.shape[1:], generator=generator).to(data.images.device)
                perturbation = noise * (_PERTURBATION_STEP / 2 * radius / noise.norm().clamp_min(1e-12))
            else:
                perturbation = start[number].clone()
            wanted = torch.full((), target, device=data.images.device)
            for _ in range(steps):
                (perturbation,) = move(next(batches)[0], wanted, perturbation)
                progress.update(1)
            found.append(perturbation)
    return torch.stack(found)


def of_other_classes(data: DefenceSet, target: int) -> DefenceSet:
    """The pictures that are not of class ``target``; all of them where there are not two others, as norms need."""
    others = data.subset(data.labels != target)
    return others if len(others) > 1 else data


def perturbed(data: DefenceSet, target: int, perturbation: Tensor) -> DefenceSet:
    """The pictures that are not of class ``target`` (`of_other_classes`) with the perturbation added."""
    others = of_other_classes(data, target)
    if others is data:
        return DefenceSet(data.images + perturbation, data.labels)
    others.images.add_(perturbation)  # a copy already: pictures in memory twice, not three times
    return others


@torch.no_grad()
def recalibrate_(model: nn.Module, data: DefenceSet, config: PruneConfig) -> None:
    """Give every BatchNorm, as running statistics, the mean of what it has on batches of ``data``; in place."""
    sums: dict[_BatchNorm, list[Tensor]] = {}

    def note(norm: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        part = [len(x) * moment for moment in torch.var_mean(x.float(), [0, *range(2, x.dim())], correction=0)]
        part.append(torch.tensor(float(len(x)), device=x.device))
        sums[norm] = [old + new for old, new in zip(sums[norm], part, strict=True)] if norm in sums else part

    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    try:
        with masked(model, (), None, batch_statistics=True):
            predict(model, data, config.batch_size, data.images.device)
    finally:
        for hook in hooks:
            hook.remove()
    for norm, (var, mean, count) in sums.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean / count)
        norm.running_var.copy_(var / count)


def learn_masks(
    model: nn.Module,
    suppressed: nn.Module,
    perturbations: Tensor,
    sites: Sequence[Site],
    magnitude: Tensor,
    data: DefenceSet,
    config: PruneConfig,
    generator: torch.Generator,
    progress: Progress,
    how: Execution = MODULES,
) -> tuple[Tensor, Tensor, Trace]:
    """Masks that raise the suppressed model's accuracy while the model keeps its own; projected SGD on [0, 1].

    The suppressed model, which may be a copy of the model, sees pictures with perturbations, as `perturb` gives them,
    scaled by random numbers from 0 to 1: what pulls them is near to the trigger, and the neurons that carry it fall
    first (docs/decisions.md, "Perturbed pictures for the masks"). The model sees the pictures as they are.
    perturbations: (k, ...) in the shape of a picture. magnitude: (neurons,) float32. Returns (masks, order, trace):
    the masks, (neurons,) float32, all starting from one; the order in which neurons are to be pruned, (neurons,) int64,
    by mask and, among equal masks such as the many that end at 0, by how hard the loss presses them down (the momentum,
    an average of the gradient).
    """
    mask = torch.ones_like(magnitude, requires_grad=True)
    momentum = torch.zeros_like(magnitude)
    trace, readings = Trace(), _Readings()
    progress.stage("masks", config.mask_steps)
    steps = _endless(lambda: data.batches(config.batch_size, generator, magnitude.device))

    def stepped(images: Tensor, labels: Tensor, which: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        # One network after the other: what the first has kept for its gradient is gone before the second runs.
        logits = logits_of(model(images))
        preserved = preserve(logits, labels, config.alpha)
        (gradient,) = torch.autograd.grad(preserved, mask)
        _add_(images, perturbations, which, scale)
        loss = eliminate(logits_of(suppressed(images)), labels, config.alpha)
        gradient += torch.autograd.grad(loss, mask)[0]
        mask_step_(mask, momentum, gradient, magnitude, rate=config.mask_rate, decay=_MOMENTUM, penalty=config.penalty)
        return (loss + preserved).detach(), logits.detach()

    step = Replayed(stepped, (mask, momentum), how.recorder)
    with masked(suppressed, sites, mask, how=how), masked(model, sites, mask, how=how):
        for _ in range(config.mask_steps):
            images, labels = next(steps)
            loss, logits = step(images, labels, *_drawn(perturbations, len(images), generator))
            readings.add(loss, logits, labels)
            progress.update(1, **readings.at_hand())
    trace.loss, trace.accuracy = readings.steps()
    masks = mask.detach()
    pressed = momentum.argsort(descending=True, stable=True)
    return masks, pressed[masks[pressed].argsort(stable=True)], trace


def finetune_(
    model: nn.Module,
    teacher: nn.Module,
    sites: Sequence[Site],
    keep: Tensor,
    perturbations: Tensor,
    data: DefenceSet,
    config: PruneConfig,
    generator: torch.Generator,
    progress: Progress,
    how: Execution = MODULES,
) -> Trace:
    """Fine-tune a pruned model in place on clean pictures, BatchNorm statistics frozen, pruned neurons held at zero.

    The loss is (1 - d) of the labels and d of the teacher, the model before pruning, on the same clean pictures
    (distillation at temperature 2, Hinton et al., arXiv 1503.02531): on clean pictures its backdoor is silent, and its
    soft answers bring back 1 to 2 points of accuracy that labels alone do not. SGD with momentum, cosine annealing and
    clipped gradients: without clipping accuracy swung by 15 points between neighbouring prune sets (docs/decisions.md).
    A share of the pictures of every batch has a random one of the perturbations, as `perturb` gives them, added, scaled
    by a random number from 0 to 1: without, fine-tuning brings part of the backdoor back. keep: (neurons,) bool.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=config.finetune_rate, momentum=_MOMENTUM, weight_decay=config.weight_decay
    )
    total = config.finetune_epochs * math.ceil(len(data) / _half_batch(config))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total))
    device = keep.device
    trace = Trace()
    progress.stage("fine-tune", config.finetune_epochs)
    with masked(teacher, sites, torch.ones(len(keep), device=device), how=how):
        # Once: the same pictures come again in every pass, and asking in every step was a quarter of the time.
        answers = predict(teacher, data, config.batch_size, device).to(device)
    # Where filters are standardised the gradient of one at zero is 1/sqrt(eps) too large, and all that clipping leaves.
    removed = list(pruned_weights(model, [site for site in sites if site.kind == "conv"], keep))
    numbered, right = DefenceSet(data.images, torch.arange(len(data))), data.labels.to(device)
    with masked(model, (), None, how=how):
        for _ in range(config.finetune_epochs):
            readings = _Readings()
            for images, rows in numbered.batches(_half_batch(config), generator, device):
                labels = right[rows]
                add_perturbations_(images, perturbations, config.perturbed_pictures, generator)
                logits = logits_of(model(images))
                loss = repair_loss(logits, answers[rows], labels, config.distillation)
                optimizer.zero_grad()
                loss.backward()
                for filters, gone in removed:
                    if filters.grad is not None:
                        filters.grad.masked_fill_(gone, 0.0)
                torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
                optimizer.step()
                schedule.step()
                prune_(model, sites, keep)
                readings.add(loss, logits, labels)
            for values, value in zip((trace.loss, trace.accuracy), readings.mean(), strict=True):
                values.append(value)
            progress.update(1, loss=trace.loss[-1], accuracy=trace.accuracy[-1])
    return trace


def add_perturbations_(images: Tensor, perturbations: Tensor, share: float, generator: torch.Generator) -> None:
    """Add to the first ``share`` of the images, in place, one of the perturbations each, scaled by U(0, 1)."""
    count = round(share * len(images))
    _add_(images[:count], perturbations, *_drawn(perturbations, count, generator))


def _drawn(perturbations: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(which, scale) of the perturbations for so many pictures, each (count,), drawn on the CPU."""
    which = torch.randint(len(perturbations), (count,), generator=generator)
    scale = torch.rand(count, generator=generator)
    return which.to(perturbations.device), scale.to(perturbations.device)


def _add_(images: Tensor, perturbations: Tensor, which: Tensor, scale: Tensor) -> None:
    images += perturbations[which] * scale.view(-1, *[1] * (images.dim() - 1))


def predict(model: nn.Module, data: DefenceSet, batch_size: int, device: torch.device) -> Tensor:
    """Logits of the model as it is now for all of ``data``: (n, classes) float32, on the CPU."""
    return torch.cat(list(predictions(model, data, batch_size, device)))


def predictions(model: nn.Module, data: DefenceSet, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """The same batch by batch, each (b, classes) float32 on the CPU, computed when asked for."""
    for images, _ in data.batches(batch_size, device=device):
        with torch.no_grad():
            logits = logits_of(model(images)).float().cpu()
        yield logits


def _half_batch(config: PruneConfig) -> int:
    return max(2, config.batch_size // 2)


def _ascend(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    parameters: list[Tensor],
    momenta: list[Tensor],
    rate: float,
    weight_decay: float,
) -> tuple[float, float]:
    """Steps of one window; (clean loss, accuracy) over it, measured before each step."""
    device = parameters[0].device
    readings = _Readings()
    for images, labels in batches:
        logits = logits_of(model(images.to(device)))
        labels = labels.to(device)
        objective = expose(logits, labels)
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            length = torch.nn.utils.get_total_norm(gradients).clamp_min(1e-12)
            torch._foreach_mul_(momenta, _MOMENTUM)
            torch._foreach_add_(momenta, torch._foreach_div(list(gradients), length))
            torch._foreach_add_(momenta, parameters, alpha=weight_decay)
            torch._foreach_add_(parameters, momenta, alpha=-rate)
        readings.add(-objective, logits, labels)
    return readings.mean()


class _Readings:
    """Loss and accuracy of steps. They stay on the device until asked for, so that a GPU never waits for the host."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []  # (loss, accuracy) of a step
        self._pictures: list[int] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            self._values.append(torch.stack([loss.detach().float(), (logits.argmax(1) == labels).float().mean()]))
        self._pictures.append(len(labels))

    def at_hand(self) -> dict[str, float]:
        """The last step's, where reading it costs nothing."""
        last = self._values[-1]
        return dict(zip(("loss", "accuracy"), last.tolist(), strict=True)) if last.device.type == "cpu" else {}

    def steps(self) -> tuple[list[float], list[float]]:
        loss, accuracy = torch.stack(self._values, 1).tolist()
        return loss, accuracy

    def mean(self) -> tuple[float, float]:
        """Over the pictures."""
        values, pictures = torch.stack(self._values).cpu().double(), torch.tensor(self._pictures, dtype=torch.double)
        loss, accuracy = ((values * pictures[:, None]).sum(0) / pictures.sum()).tolist()
        return loss, accuracy


def _windows(data: DefenceSet, batch_size: int, generator: torch.Generator) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Shuffled batches without end, in like groups of about `_WINDOW` pictures and never across two passes."""
    while True:
        batches = list(data.batches(batch_size, generator))
        rest = iter(batches)
        for count in windows_of(len(batches), batch_size):
            yield list(islice(rest, count))


def windows_of(batches: int, batch_size: int) -> list[int]:
    """How many batches each window of a pass of so many has: a last one of a few pictures would measure no accuracy."""
    count = max(1, round(batches / max(1, _WINDOW // batch_size)))
    return [batches * (number + 1) // count - batches * number // count for number in range(count)]


def _endless(batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches()
