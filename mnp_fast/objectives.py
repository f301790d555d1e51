"""The three objectives of MNP (arXiv 2405.17750) as pure functions; how they are reconstructed: docs/method.md."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_TEMPERATURE = 2.0
_TINY = 1e-6  # the root has no slope at 0


def expose(logits: Tensor, labels: Tensor) -> Tensor:
    """Clean suppression, to be minimised over the weights: -E L(F(x; theta), y). Weight decay is the optimiser's.

    logits: (b, classes) floating; labels: (b,) int64. Returns a scalar.
    """
    return -F.cross_entropy(logits.float(), labels)


def eliminate(suppressed_logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """First term of the loss of the masks, alpha sqrt L(F_m(x; theta_hat), y) + (1 - alpha) L(F_m(x; theta), y).

    The suppressed model theta_hat gets better where a neuron of the backdoor goes. The root is ours: its loss is tens
    of nats where theta's is tenths, and drowned it (docs/decisions.md, "Root of the suppressed loss"). The weight
    penalty lambda sum_i m_i M_i is linear in the masks: `mask_step_` adds its gradient. suppressed_logits:
    (b, classes) floating; labels: (b,) int64. Returns a scalar.
    """
    return alpha * F.cross_entropy(suppressed_logits.float(), labels).clamp_min(_TINY).sqrt()


def preserve(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Second term of that loss: the model itself under the same masks. Shapes as for `eliminate`."""
    return (1 - alpha) * F.cross_entropy(logits.float(), labels)


def pull(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of a universal perturbation: cross-entropy of the perturbed pictures as if all were of class ``target``.

    logits: (b, classes) floating; target: () int64. Returns a scalar.
    """
    return F.cross_entropy(logits.float(), target.expand(len(logits)))


def repair_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, distillation: float) -> Tensor:
    """Loss of fine-tuning: (1 - d) cross-entropy + d T^2 KL(teacher || model) at temperature T = 2 (arXiv 1503.02531).

    logits, teacher_logits: (b, classes) floating; labels: (b,) int64. Returns a scalar.
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    soft = F.kl_div(
        F.log_softmax(logits / _TEMPERATURE, 1),
        F.log_softmax(teacher_logits / _TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - distillation) * F.cross_entropy(logits, labels) + distillation * _TEMPERATURE**2 * soft
