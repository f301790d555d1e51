"""The objectives against their formulas, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnp_fast.objectives import eliminate, expose, preserve, pull, repair_loss

LABELS = torch.tensor([0, 2, 1, 4, 2, 2])


def logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))


def softmax(x: Tensor) -> Tensor:
    exponentials = x.double().exp()
    return exponentials / exponentials.sum(1, keepdim=True)


def cross_entropy(x: Tensor) -> Tensor:
    return -softmax(x)[torch.arange(6), LABELS].log().mean()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_expose() -> None:
    x = logits(0).requires_grad_()
    loss = expose(x, LABELS)
    assert loss.shape == ()
    close(loss, -cross_entropy(x))
    loss.backward()
    assert x.grad is not None
    # Down this gradient the right class falls and all others rise.
    close(x.grad, (F.one_hot(LABELS, 5) - softmax(x.detach())) / 6)


def test_expose_of_an_undecided_model_is_minus_chance() -> None:
    assert float(expose(torch.zeros(6, 5), LABELS)) == pytest.approx(-math.log(5))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_eliminate_and_preserve(alpha: float) -> None:
    suppressed, own = logits(1).requires_grad_(), logits(2).requires_grad_()
    loss = eliminate(suppressed, LABELS, alpha) + preserve(own, LABELS, alpha)
    assert loss.shape == ()
    root = cross_entropy(suppressed.detach()).sqrt()
    close(loss, alpha * root + (1 - alpha) * cross_entropy(own))
    loss.backward()
    for x, share in ((suppressed, alpha / (2 * root)), (own, 1 - alpha)):
        assert x.grad is not None
        close(x.grad, share * (softmax(x.detach()) - F.one_hot(LABELS, 5)) / 6)


def test_a_suppressed_model_that_is_never_wrong() -> None:
    x = (1e4 * F.one_hot(LABELS, 5).float()).requires_grad_()
    (gradient,) = torch.autograd.grad(eliminate(x, LABELS, 0.5), x)
    assert not bool(gradient.any())


@pytest.mark.parametrize("target", [0, 3, 4])
def test_pull(target: int) -> None:
    x = logits(3).requires_grad_()
    loss = pull(x, torch.tensor(target))
    assert loss.shape == ()
    close(loss, -softmax(x)[:, target].log().mean())
    (gradient,) = torch.autograd.grad(loss, x)
    close(gradient, (softmax(x.detach()) - F.one_hot(torch.full((6,), target), 5)) / 6)


@pytest.mark.parametrize("distillation", [0.0, 0.25, 1.0])
def test_repair_loss(distillation: float) -> None:
    x, teacher = logits(4).requires_grad_(), logits(5)
    loss = repair_loss(x, teacher, LABELS, distillation)
    assert loss.shape == ()
    taught, own = softmax(teacher / 2), softmax(x / 2)
    divergence = (taught * (taught.log() - own.log())).sum(1).mean()
    close(loss, (1 - distillation) * cross_entropy(x) + distillation * 4 * divergence)
    loss.backward()
    assert x.grad is not None
    hard = (softmax(x.detach()) - F.one_hot(LABELS, 5)) / 6
    soft = 4 * (own.detach() - taught) / 2 / 6
    close(x.grad, (1 - distillation) * hard + distillation * soft)


def test_nothing_to_learn_from_oneself() -> None:
    x = logits(6).requires_grad_()
    loss = repair_loss(x, x.detach() + 7.0, LABELS, 1.0)  # softmax does not see a constant
    loss.backward()
    assert x.grad is not None
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(x.grad.abs().max()) < 1e-6


def test_half_precision_is_computed_in_full() -> None:
    a, b = logits(7).bfloat16(), logits(8).bfloat16()
    pairs = [
        (expose(a, LABELS), expose(a.float(), LABELS)),
        (eliminate(a, LABELS, 0.4), eliminate(a.float(), LABELS, 0.4)),
        (preserve(b, LABELS, 0.4), preserve(b.float(), LABELS, 0.4)),
        (pull(a, LABELS[1]), pull(a.float(), LABELS[1])),
        (repair_loss(a, b, LABELS, 0.4), repair_loss(a.float(), b.float(), LABELS, 0.4)),
    ]
    for half, full in pairs:
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_confident_and_wrong_stays_finite() -> None:
    x = torch.full((6, 5), -1e4).scatter(1, ((LABELS + 1) % 5)[:, None], 1e4).requires_grad_()
    losses = (expose(x, LABELS), eliminate(x, LABELS, 0.5), preserve(x, LABELS, 0.5), pull(x, LABELS[0]))
    losses += (repair_loss(x, -x, LABELS, 0.5),)
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, x)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())
