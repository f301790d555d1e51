"""The settings of a run: one set of defaults for all models, each with its source."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields

from mnp_fast.errors import ConfigError


@dataclass(frozen=True)
class PruneConfig:
    """Settings of `mnp_fast.prune` and `mnp_fast.scan`.

    "Paper" is MNP (arXiv 2405.17750), whose constants are not public; "measured" means docs/decisions.md says how.
    """

    batch_size: int = 128
    """Pictures a step in every optimised stage. ANP and RNP use 128."""
    held_back: float = 0.2
    """Share of the defence set, .01 to .9, that nothing is learned from; it limits pruning and gives the metrics."""

    precision: str = "auto"
    """Of convolutions, linear layers and attention: "float32", "bfloat16", or "auto", bfloat16 where the processor has
    such products. Weights, masks, sums and steps are float32 in any case."""

    looks: int = 3
    """At most so many suppressed models, whose evidence is averaged: the first from all learning pictures, the others,
    where it finds something and they can still matter, each from its own part of them. With 1 the bounds below that
    were measured are .75 and .9. Measured."""
    suppression_stop: float = 0.25
    """Clean suppression ends when accuracy has fallen to this share of what it was at first, from .01 to .99.
    Measured."""
    suppression_rate: float = 4e-3
    """Length of the first suppression steps, L2 in weight space, at momentum 0. It adapts from there. Measured."""
    weight_decay: float = 5e-4
    """mu of the paper's clean suppression, max E L - mu ||theta||^2; also used in fine-tuning."""
    suppression_epochs: int = 80
    """At most so many passes over the learning pictures in clean suppression."""

    perturbations: int = 6
    """Universal perturbations: so many on the suppressed model for evidence, and as many again for repair. Measured."""
    perturbation_steps: int = 20
    """Steps that each of them takes. Measured."""
    evidence_size: float = 0.5
    """Size of those for evidence, made with batch statistics: their L2 norm over the mean L2 norm of the pictures'
    deviation from the mean of each channel. Measured."""
    perturbation_size: float = 0.4
    """The same of those for masks and fine-tuning, made with fixed statistics; a quarter of it in the search for the
    class, half where no class is suspected. Measured."""

    alpha: float = 0.3
    """Weight of the loss of the suppressed model against that of the model itself, in [0, 1]. Measured."""
    penalty: float = 2e-3
    """lambda of the paper's weight penalty on mask times magnitude; 0 for none. Measured."""
    mask_rate: float = 0.05
    """Learning rate of the masks (projected SGD with momentum). Measured."""
    mask_steps: int = 80
    """Steps of the masks. Measured: 80, which is 20 passes over 500 pictures."""

    threshold: float = 0.65
    """Neurons whose masks are up to this may be pruned, in [0, 1). Measured."""
    accuracy_limit: float = 0.15
    """Accuracy that pruning may cost before fine-tuning where a target is suspected, in [0, 1]. Measured."""

    finetune_epochs: int = 15
    """Passes of fine-tuning over the learning pictures, pruned neurons held at zero; 0 for none. Measured."""
    finetune_rate: float = 1e-2
    """First learning rate of fine-tuning, annealed to 0 by a cosine; gradients are clipped to norm 1. Measured."""
    perturbed_pictures: float = 0.25
    """Share of the pictures that fine-tuning perturbs, in [0, 1]. Measured."""
    distillation: float = 0.7
    """Weight of the unpruned model's soft answers on clean pictures in fine-tuning, in [0, 1]; 1 where no class is
    suspected, a smaller share of the pictures being perturbed there, at a smaller rate (docs/method.md, "Stages").
    Measured."""

    evidence_score: float = 0.75
    """Score (docs/method.md, "Verdict") from which there is "evidence of a backdoor". Measured."""
    suspicion_score: float = 0.65
    """The same for "suspicious". Measured."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "precision":
                if value not in _PRECISIONS:
                    raise ConfigError(f"precision is {value!r}; it must be one of {', '.join(_PRECISIONS)}")
                continue
            whole = field.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "a whole number" if whole else "a number"
                raise ConfigError(f"{field.name} is {value!r}, a {type(value).__name__}; give {kind}")
            low, high = _RANGES.get(field.name, (0, math.inf))
            if not (low <= value <= high) or value == math.inf or value > sys.maxsize:
                raise ConfigError(f"{field.name} is {value}; it must lie between {low:g} and {high:g}")
        if self.suspicion_score > self.evidence_score:
            raise ConfigError(
                f"suspicion_score ({self.suspicion_score}) is above evidence_score ({self.evidence_score}); "
                "suspicion must come before evidence"
            )


BEYOND_LOOKS = frozenset(
    (
        "alpha",
        "penalty",
        "mask_rate",
        "mask_steps",
        "threshold",
        "accuracy_limit",
        "finetune_epochs",
        "finetune_rate",
        "perturbed_pictures",
        "distillation",
        "evidence_score",
        "suspicion_score",
    )
)
"""Settings that no look reads; the bounds of the verdict decide whether there is another one."""

_PRECISIONS = ("auto", "float32", "bfloat16")
_TINY = 1e-30
_RANGES: dict[str, tuple[float, float]] = {
    "batch_size": (2, math.inf),
    "held_back": (0.01, 0.9),
    "looks": (1, math.inf),
    "suppression_stop": (0.01, 0.99),
    "suppression_rate": (_TINY, 1.0),
    "suppression_epochs": (1, math.inf),
    "perturbations": (1, math.inf),
    "perturbation_steps": (1, math.inf),
    "evidence_size": (_TINY, math.inf),
    "perturbation_size": (_TINY, math.inf),
    "alpha": (0, 1),
    "mask_rate": (_TINY, math.inf),
    "mask_steps": (1, math.inf),
    "threshold": (0, 0.99),
    "accuracy_limit": (0, 1),
    "perturbed_pictures": (0, 1),
    "finetune_rate": (_TINY, 1.0),
    "distillation": (0, 1),
    "evidence_score": (0, 1),
    "suspicion_score": (0, 1),
}
