"""Verdict and evidence, from clean pictures alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnp_fast.config import PruneConfig

EVIDENCE = "evidence of a backdoor"
SUSPICIOUS = "suspicious"
NONE_FOUND = "no evidence found"
FEWEST_CLASSES = 5
"""With fewer, clean networks collapse into one class too (seen with 2 to 4): suspicion is then all there can be."""


@dataclass(frozen=True)
class Evidence:
    """What the suppressed model says of clean pictures, as they are and with universal perturbations.

    classes: how many there are. collapse_share: the share of all clean pictures that it puts into the class it predicts
    most often; second_share: the share of the class after it; suppressed_loss: its mean cross-entropy in nats.
    searched_class: the class that a small perturbation pulls into best; pulled_class: that one or the one it predicts
    most often, into whichever perturbations for evidence pull better; perturbed_share: the share of pictures of other
    classes that it puts there once they are perturbed, mean over the perturbations. batch_norms: whether the network
    has any BatchNorm.
    """

    classes: int
    collapse_share: float
    second_share: float
    suppressed_loss: float
    searched_class: int
    pulled_class: int
    perturbed_share: float
    batch_norms: bool

    def report(self) -> dict[str, Any]:
        return asdict(self)


def commonest(logits: Tensor, count: int) -> list[int]:
    """The ``count`` classes predicted most often, commonest first, of equals the first; from logits (n, classes)."""
    predicted = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    found: list[int] = predicted.argsort(descending=True, stable=True)[:count].tolist()
    return found


def weigh(
    suppressed_logits: Tensor, labels: Tensor, perturbed_logits: Mapping[int, Tensor], batch_norms: bool
) -> Evidence:
    """Evidence from the suppressed model's logits (n, classes) for clean pictures with ``labels`` (n,).

    perturbed_logits: for each class that is weighed, the searched one first, (k, classes) of pictures of other classes
    that are perturbed towards it.
    Clean suppression takes the clean function away; where a backdoor stays behind, it pulls clean pictures into its
    target class, and what little must be added to pull all of them is found easily. Limits: docs/method.md, "Verdict".
    """
    pulled = {one: float((logits.argmax(1) == one).double().mean()) for one, logits in perturbed_logits.items()}
    best = max(pulled, key=pulled.__getitem__)
    counts = torch.bincount(suppressed_logits.argmax(1), minlength=suppressed_logits.shape[1])
    shares = counts.double() / len(labels)
    top = shares.topk(2)
    return Evidence(
        classes=len(counts),
        collapse_share=float(top.values[0]),
        second_share=float(top.values[1]),
        suppressed_loss=float(F.cross_entropy(suppressed_logits, labels)),
        searched_class=next(iter(pulled)),
        pulled_class=best,
        perturbed_share=pulled[best],
        batch_norms=batch_norms,
    )


def verdict(evidence: Evidence, config: PruneConfig) -> tuple[str, int | None]:
    """(verdict, suspected target class or None). Never "clean": at best no evidence was found."""
    # Without batch statistics, that take out what all pictures share, a clean network is fooled too (a ViT: 1.0), and
    # an attacked one into another class than its target.
    sound = evidence.batch_norms and evidence.classes >= FEWEST_CLASSES
    if evidence.perturbed_share >= config.evidence_share and sound:
        return EVIDENCE, evidence.pulled_class
    if evidence.perturbed_share >= config.suspicion_share:
        return SUSPICIOUS, evidence.pulled_class if evidence.batch_norms else None
    return NONE_FOUND, None
