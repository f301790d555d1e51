"""Verdict and evidence, from clean pictures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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

    classes: how many there are. collapse_class: the class it predicts most often; collapse_share: the share of all
    clean pictures that it puts there; second_share: the share of the class after it; suppressed_loss: its mean
    cross-entropy in nats; perturbed_share: the share of pictures of other classes that it puts into the collapse class
    once they are perturbed, mean over the perturbations; batch_norms: whether the network has any BatchNorm.
    agreed_share: the perturbed_share that two suppressed models reach with the same class; of one alone its own.
    """

    classes: int
    collapse_class: int
    collapse_share: float
    second_share: float
    suppressed_loss: float
    perturbed_share: float
    batch_norms: bool
    agreed_share: float

    def report(self) -> dict[str, Any]:
        return asdict(self)


def commonest(logits: Tensor, count: int) -> list[int]:
    """The ``count`` classes predicted most often, commonest first, of equals the first; from logits (n, classes)."""
    predicted = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    found: list[int] = predicted.argsort(descending=True, stable=True)[:count].tolist()
    return found


def weigh(suppressed_logits: Tensor, labels: Tensor, perturbed_logits: Tensor, batch_norms: bool) -> Evidence:
    """Evidence from the suppressed model's logits (n, classes) for clean pictures with ``labels`` (n,).

    perturbed_logits: (k, classes), for perturbed pictures of the other classes.
    Clean suppression takes the clean function away; where a backdoor stays behind, it pulls clean pictures into its
    target class, and what little must be added to pull all of them is found easily. Limits: docs/method.md, "Verdict".
    """
    found = commonest(suppressed_logits, 1)[0]
    counts = torch.bincount(suppressed_logits.argmax(1), minlength=suppressed_logits.shape[1])
    shares = counts.double() / len(labels)
    top = shares.topk(2)
    pulled = float((perturbed_logits.argmax(1) == found).double().mean())
    return Evidence(
        classes=len(counts),
        collapse_class=found,
        collapse_share=float(top.values[0]),
        second_share=float(top.values[1]),
        suppressed_loss=float(F.cross_entropy(suppressed_logits, labels)),
        perturbed_share=pulled,
        batch_norms=batch_norms,
        agreed_share=pulled,
    )


def agree(tries: Sequence[Evidence]) -> tuple[int, float]:
    """(number, agreed_share): the class that two suppressed models name with the largest share in the second of them.

    number: of the first try that named that class; the first of all, with a share of 0, where no two named the same.
    One try alone agrees with itself.
    """
    if len(tries) == 1:
        return 0, tries[0].perturbed_share
    best = (0.0, 0)
    for number, first in enumerate(tries):
        shares = sorted(
            (one.perturbed_share for one in tries if one.collapse_class == first.collapse_class), reverse=True
        )
        best = max(best, (shares[1] if len(shares) > 1 else 0.0, -number))
    return -best[1], best[0]


def certain(tries: Sequence[Evidence], at_most: int, config: PruneConfig) -> bool:
    """Whether no further try, of ``at_most`` in all, can change the verdict."""
    left = at_most - len(tries)
    if not tries or left <= 0:
        return bool(tries)
    # A try never lowers what two agree on; the next one can raise it to the largest share so far, two can to 1.
    least = agree(tries)[1] if len(tries) > 1 else 0.0
    most = 1.0 if left > 1 else max(one.perturbed_share for one in tries)
    ends = {verdict(replace(tries[0], agreed_share=share), config)[0] for share in (least, most)}
    return len(ends) == 1


def verdict(evidence: Evidence, config: PruneConfig) -> tuple[str, int | None]:
    """(verdict, suspected target class or None). Never "clean": at best no evidence was found."""
    # Without batch statistics, that take out what all pictures share, a clean network is fooled too (a ViT: 1.0), and
    # an attacked one into another class than its target.
    sound = evidence.batch_norms and evidence.classes >= FEWEST_CLASSES
    if evidence.agreed_share >= config.evidence_share and sound:
        return EVIDENCE, evidence.collapse_class
    if evidence.agreed_share >= config.suspicion_share:
        return SUSPICIOUS, evidence.collapse_class if evidence.batch_norms else None
    return NONE_FOUND, None
