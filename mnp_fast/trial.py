"""What a network must show on the pictures before a run begins: that it can be differentiated, and knows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet, logits_of
from mnp_fast.errors import DataError, ModelError
from mnp_fast.masked import Execution, masked
from mnp_fast.optimize import predict
from mnp_fast.sites import Site, total_neurons, undisturbed

_LEAST_KAPPA = 0.2
"""Agreement of answers and labels beyond chance that a model must show; "slight" ends here (Landis and Koch, 1977)."""


def check_gradients(model: nn.Module, images: Tensor, how: Execution) -> None:
    """ModelError where no gradient goes from the logits to the pictures, on which every stage rests.

    images: (b, ...) float32 on the model's device.
    """
    images = images.clone().requires_grad_()
    try:
        with undisturbed(model), masked(model, (), None, how=how):
            torch.autograd.grad(logits_of(model(images.clone())).float().logsumexp(1).sum(), images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be differentiated ({str(error).splitlines()[0][:200]}); give the network as it is "
            "trained, in floating point, without no_grad or detach in its forward"
        ) from error


def accuracy_on(
    model: nn.Module, sites: Sequence[Site], data: DefenceSet, config: PruneConfig, how: Execution
) -> float:
    """Accuracy in [0, 1] on all pictures, after `check_answers`."""
    device = data.images.device
    with undisturbed(model), masked(model, sites, torch.ones(total_neurons(sites), device=device), how=how):
        answers = predict(model, data, config.batch_size, device).argmax(1)
    return check_answers(answers, data.labels)


def check_answers(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy in [0, 1] of predicted classes (n,), int64 as the labels are.

    DataError where they agree hardly better than by chance, by Cohen's kappa (1960): such pictures or labels are not
    those that the model was trained with, and say nothing of it.
    """
    accuracy = float((predicted == labels).double().mean())
    classes = int(max(predicted.max(), labels.max())) + 1
    shares = [torch.bincount(answers, minlength=classes).double() / len(labels) for answers in (predicted, labels)]
    chance = float((shares[0] * shares[1]).sum())
    if accuracy - chance < _LEAST_KAPPA * (1 - chance):
        raise DataError(
            f"the model is right on {accuracy:.1%} of the loader's pictures, where chance would be on {chance:.1%}; "
            "check that the classes are numbered as in training, size, mean and std of the pictures, and the weights"
        )
    return accuracy
