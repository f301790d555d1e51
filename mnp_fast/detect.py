"""Verdict and evidence, from clean pictures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnp_fast.config import PruneConfig
from mnp_fast.waves import Wave

EVIDENCE = "evidence of a backdoor"
SUSPICIOUS = "suspicious"
NONE_FOUND = "no evidence found"
FEWEST_CLASSES = 5
"""With fewer, clean networks collapse into one class too (seen with 2 to 4): suspicion is then all there can be."""
FEWEST_PICTURES = 150
"""With fewer all looks are at the same ones, and what these say is not averaged out: of twelve clean runs with 100 five
had a score of .65 and more, two of them .75 and more."""
_SPARED, _MINDED = 0.4, 0.75
"""Shares of `evidence_score` at which the precaution begins and is whole."""
_FOUND, _LEAST = 0.85, 0.2
"""Where the search pulls so many pictures into its class the precaution is at least so strong."""
_CONTRAST = 1.8
"""What the contrast of a wave counts for: networks with SIG had .6 and more, all others less than .25."""
_TRANSFER = 2.4
"""What the lead of the class that transfers best counts for: clean networks had leads up to .28, attacked ones, where
the trigger is found at all, from .38 on."""


@dataclass(frozen=True)
class Look:
    """What one suppressed model says of clean pictures, as they are and with universal perturbations.

    pictures: how many clean ones it is of. classes: how many the network has, or of how many there are pictures where
    these are fewer. collapse_share: the share of all clean pictures that it puts into the class it predicts most often;
    second_share: the share of the class after it; suppressed_loss: its mean cross-entropy in nats. searched_class: the
    class that a small perturbation pulls into best; searched_share: the share of learning pictures of other classes
    that it pulls; pulled_class: that class or the one it predicts most often, into whichever perturbations for evidence
    pull better; perturbed_share: the share of pictures of other classes that it puts there once they are perturbed,
    mean over the perturbations. transferred_class: the class whose small perturbation fools the model itself best;
    transferred_share: the share of pictures of other classes that the model puts there with it; transferred_second: the
    same of the class after it. wave_class and wave_contrast: the class and the contrast of the wave whose phase matters
    most to the model itself (`mnp_fast.waves`; None and 0 where no waves were tried). batch_norms: whether the network
    has any BatchNorm.
    """

    pictures: int
    classes: int
    collapse_share: float
    second_share: float
    suppressed_loss: float
    searched_class: int
    searched_share: float
    pulled_class: int
    perturbed_share: float
    transferred_class: int
    transferred_share: float
    transferred_second: float
    wave_class: int | None
    wave_contrast: float
    batch_norms: bool

    @property
    def signs(self) -> list[tuple[str, int | None, float]]:
        """(what, class that it names, how much it says in [0, 1]).

        Without BatchNorm the perturbed share does not count: nothing takes out what all pictures share, and a clean ViT
        is fooled altogether (1.0).
        """
        lead = self.transferred_share - self.transferred_second
        signs = [("pull", self.pulled_class, self.perturbed_share)] if self.batch_norms else []
        signs.append(("transfer", self.transferred_class, _TRANSFER * lead))
        wave = ("wave", self.wave_class, _CONTRAST * self.wave_contrast)
        return [(kind, one, min(1.0, max(0.0, share))) for kind, one, share in (*signs, wave)]

    @property
    def sums(self) -> dict[int | None, float]:
        """By class, the signs that name it, added up; in the order of the signs."""
        sums: dict[int | None, float] = {}
        for _, one, share in self.signs:
            sums[one] = sums.get(one, 0.0) + share
        return sums

    @property
    def score(self) -> float:
        """The most that it says of one class, in [0, 1]."""
        return min(1.0, max(self.sums.values()))

    def report(self) -> dict[str, Any]:
        """Its fields and signs as JSON values."""
        return asdict(self) | {
            "signs": [{"sign": kind, "class": one, "counts": share} for kind, one, share in self.signs]
        }


@dataclass(frozen=True)
class Evidence:
    """What all looks say together. looks: one or more, of the same network; the first at all pictures, the others each
    at its own part of them.

    Much of what one look says of a clean network hangs on its pictures and its noise; what is said of an attacker's
    class does not (docs/decisions.md).
    """

    looks: tuple[Look, ...]

    @property
    def said(self) -> dict[int | None, float]:
        """By class, what is said of it in [0, 1]: the sum of the signs that name it, at most 1 a look, mean over the
        looks; most first, of equals the one with the greater sums, and then the one that was named first."""
        sums = {one: [look.sums.get(one, 0.0) for look in self.looks] for look in self.looks for one in look.sums}
        said = {one: sum(min(1.0, share) for share in shares) / len(shares) for one, shares in sums.items()}
        return {one: said[one] for one in sorted(said, key=lambda one: (-said[one], -sum(sums[one])))}

    @property
    def suspect(self) -> int | None:
        """The class that most is said of."""
        return next(iter(self.said))

    @property
    def score(self) -> float:
        """What is said of the suspect."""
        return self.said[self.suspect]

    @property
    def telling(self) -> int:
        """Number of the look that says most of the suspect, from 0; of equals the first."""
        said = [look.sums.get(self.suspect, 0.0) for look in self.looks]
        return said.index(max(said))

    @property
    def by_wave(self) -> bool:
        """Whether waves say more of the suspect than each of the other signs does."""
        sums: dict[str, float] = {}
        for kind, one, share in (sign for look in self.looks for sign in look.signs):
            if one == self.suspect:
                sums[kind] = sums.get(kind, 0.0) + share
        return max(sums, key=sums.__getitem__) == "wave"

    @property
    def classes(self) -> int:
        return self.looks[0].classes

    @property
    def batch_norms(self) -> bool:
        return self.looks[0].batch_norms

    def report(self) -> dict[str, Any]:
        """Score, what is said of each class, most first, and the looks, as JSON values."""
        return {
            "score": self.score,
            "said": [{"class": one, "counts": share} for one, share in self.said.items()],
            "classes": self.classes,
            "batch_norms": self.batch_norms,
            "looks": [look.report() for look in self.looks],
        }


def undecided(looks: Sequence[Look], config: PruneConfig) -> bool:
    """Whether there is to be another look: one is left (``config.looks``), the first says at least half of what is
    evidence of one class, and those that are left can still make a class suspicious."""
    left = config.looks - len(looks)
    most = Evidence(tuple(looks)).score * len(looks)
    return (
        left > 0
        and looks[0].score >= config.evidence_score / 2
        and (most + left) / config.looks >= config.suspicion_score
    )


def commonest(logits: Tensor, count: int) -> list[int]:
    """The ``count`` classes predicted most often, commonest first, of equals the first; from logits (n, classes)."""
    predicted = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    found: list[int] = predicted.argsort(descending=True, stable=True)[:count].tolist()
    return found


def weigh(
    suppressed_logits: Tensor,
    labels: Tensor,
    perturbed_logits: Mapping[int, Tensor],
    searched_share: float,
    transferred: Mapping[int, float],
    wave: Wave | None,
    batch_norms: bool,
) -> Look:
    """One look, from the suppressed model's logits (n, classes) for clean pictures with ``labels`` (n,).

    perturbed_logits: for each class that is weighed, the searched one first, (k, classes) of pictures of other classes
    that are perturbed towards it. searched_share: as in `Look`. transferred: for each class that was searched, the
    share of pictures of other classes that the model itself puts there with its small perturbation. wave: as
    `find_wave` gives it.
    Clean suppression takes the clean function away; where a backdoor stays behind, it pulls clean pictures into its
    target class, and what little must be added to pull all of them is found easily; where that is near the trigger it
    fools the model itself too, while fragile clean models are fooled into several classes alike. Limits:
    docs/method.md, "Verdict".
    """
    pulled = {one: float((logits.argmax(1) == one).double().mean()) for one, logits in perturbed_logits.items()}
    best = max(pulled, key=pulled.__getitem__)
    carried = sorted(transferred, key=transferred.__getitem__, reverse=True)
    counts = torch.bincount(suppressed_logits.argmax(1), minlength=suppressed_logits.shape[1])
    shares = counts.double() / len(labels)
    top = shares.topk(2)
    return Look(
        pictures=len(labels),
        classes=min(len(counts), len(labels.unique())),
        collapse_share=float(top.values[0]),
        second_share=float(top.values[1]),
        suppressed_loss=float(F.cross_entropy(suppressed_logits, labels)),
        searched_class=next(iter(pulled)),
        searched_share=searched_share,
        pulled_class=best,
        perturbed_share=pulled[best],
        transferred_class=carried[0],
        transferred_share=transferred[carried[0]],
        transferred_second=transferred[carried[1]] if len(carried) > 1 else 0.0,
        wave_class=None if wave is None else wave.target,
        wave_contrast=0.0 if wave is None else wave.contrast,
        batch_norms=batch_norms,
    )


def verdict(evidence: Evidence, config: PruneConfig) -> tuple[str, int | None]:
    """(verdict, suspected target class or None). Never "clean": at best no evidence was found."""
    # Few networks without BatchNorm have been seen, so that these too are never more than suspicious.
    enough = evidence.classes >= FEWEST_CLASSES and evidence.looks[0].pictures >= FEWEST_PICTURES
    if evidence.score >= config.evidence_score and evidence.batch_norms and enough:
        return EVIDENCE, evidence.suspect
    if evidence.score >= config.suspicion_score:
        return SUSPICIOUS, evidence.suspect
    return NONE_FOUND, None


def repair_strength(evidence: Evidence, config: PruneConfig) -> float:
    """How strong the repair is, in [0, 1]: 1 where a class is suspected.

    Where none is, it grows with what the first look says, from 0 at two fifths of `evidence_score` to 1 at three
    quarters of it: what is far from suspicion is to stay as it is, but an attacked network was missed that the first
    look gave .37 to .78 and the others less. It is at least a fifth where a small perturbation pulls the suppressed
    model nearly whole: so it did in all thirteen runs of two networks that were missed, whatever the score, and seldom
    on clean ones with BatchNorm that have as little to say (docs/decisions.md).
    """
    if evidence.score >= config.suspicion_score:
        return 1.0
    first = evidence.looks[0]
    least = _LEAST if first.batch_norms and first.searched_share >= _FOUND else 0.0
    share = first.score / config.evidence_score
    return min(1.0, max(least, (share - _SPARED) / (_MINDED - _SPARED)))


def repair_classes(evidence: Evidence, config: PruneConfig) -> list[int]:
    """Towards which classes the perturbations of the repair go: the suspect alone where its score is one of evidence.

    Below that also, or where nothing is suspected only, the class that the first look searched and the one that is
    pulled into best there: the suspect of one network that was no more than suspicious was not the attacker's class,
    but these were.
    """
    if evidence.score >= config.evidence_score and evidence.suspect is not None:
        return [evidence.suspect]
    suspect = verdict(evidence, config)[1]
    looked_at = [evidence.looks[0].searched_class, evidence.looks[0].pulled_class]
    return list(dict.fromkeys(looked_at if suspect is None else [suspect, *looked_at]))
