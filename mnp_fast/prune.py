"""The public calls: the stages in order, and what they give back."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mnp_fast.config import PruneConfig
from mnp_fast.data import check_model, collect
from mnp_fast.detect import repair_strength, verdict
from mnp_fast.device import ordinary_modes
from mnp_fast.result import PruneResult, ScanResult
from mnp_fast.run import Run


@ordinary_modes()
def prune(
    model: nn.Module,
    loader: Any,
    config: PruneConfig | None = None,
    *,
    triggered_loader: Any = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PruneResult:
    """Look for a backdoor in an image classifier and prune the neurons that carry it.

    Where none is suspected, but a first look says two fifths of what is evidence, or its search pulls most pictures
    into one class, the copy is still pruned a little and fine-tuned, the more the more it says, as a precaution against
    what the verdict misses; else it stays as it came. `scan` gives the verdict alone. Stages: docs/method.md.

    model: any nn.Module whose output is logits (b, classes), or has them as ``.logits``; in any mode, on any device. It
        is never changed, also where the run fails or is interrupted; the result holds a repaired copy.
    loader: re-iterable of clean (images, labels) batches, or of mappings with pixel_values and labels; some hundreds of
        pictures, normalised as in training, read once. images: (b, ...) floating; labels: (b,) integer.
    config: settings; the defaults are meant for every model.
    triggered_loader: pictures with the trigger, labelled with the class that the attacker wants; only measured, before
        and after, never used for a choice. Leave pictures of that class out.
    device: where to compute (default: where the model is). seed: the same seed gives the same masks and weights on the
        same machine and backend. progress: show stages on standard error.
    checkpoint: directory in which every stage is kept as it ends. The same call goes on after the last stage that is
        there, bit for bit as if it had not been interrupted; `scan` and `prune` share theirs, and so do repairs with
        other settings (`mnp_fast.config.BEYOND_LOOKS`) as far as the evidence. It may be deleted then.

    Raises DataError, ModelError, ConfigError or FileError, each naming cause and remedy.
    """
    run = Run(model, loader, config, device, seed, progress, checkpoint)
    triggered = None
    if triggered_loader is not None:
        triggered = collect(triggered_loader, seed=seed, what="triggered_loader", min_pictures=1, min_classes=1)
        check_model(model, triggered)
    with run.stages():
        suppressed, evidence = run.expose()
        target = verdict(evidence, run.config)[1]
        strength = repair_strength(evidence, run.config)
        if strength:
            config = run.config if target is not None else _gentler(run.config, strength)
            perturbations = run.perturb(suppressed, evidence, target, config)
            if target is None:
                suppressed = run.working_copy()  # suppression exposed nothing, and what it broke misleads the masks
            mask, order = run.learn_masks(suppressed, perturbations)
            del suppressed
            selection = run.select(mask, order, config.accuracy_limit)
            repaired = run.repair(selection, perturbations, config)
        else:
            mask, selection, repaired = run.untouched()
        return run.result(evidence, strength, mask, selection, repaired, triggered)


@ordinary_modes()
def scan(
    model: nn.Module,
    loader: Any,
    config: PruneConfig | None = None,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> ScanResult:
    """The verdict without the repair: up to three looks (docs/method.md). Arguments and errors as for `prune`."""
    run = Run(model, loader, config, device, seed, progress, checkpoint)
    with run.stages():
        evidence = run.expose()[1]
    found, target = verdict(evidence, run.config)
    return ScanResult(found, target, evidence.report(), run.history, run.report())


def _gentler(config: PruneConfig, strength: float) -> PruneConfig:
    """The settings of a repair of such strength in (0, 1] where no class is suspected: less is pruned, and learned at a
    smaller rate. Whatever the strength the model's own answers are all that is learned, perturbations are half as large
    and fewer pictures carry one: clean networks pay for these, but a missed backdoor that met smaller perturbations yet
    stayed whole. They take twice the steps: what the looks have missed is found late (docs/decisions.md).
    """
    return replace(
        config,
        perturbation_size=config.perturbation_size / 2,
        perturbation_steps=2 * config.perturbation_steps,
        accuracy_limit=strength * config.accuracy_limit,
        finetune_rate=strength * config.finetune_rate,
        perturbed_pictures=0.6 * config.perturbed_pictures,
        distillation=1.0,
    )
