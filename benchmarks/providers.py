"""One step of mask learning, by four providers, and the check of each against the reference.

A step: logits of the images under the masks, cross-entropy, its gradient with respect to the masks, and
momentum = decay * momentum + gradient + penalty * magnitude; mask = clamp(mask - rate * momentum, 0, 1).

- published: as the published code of ANP and RNP runs it. float32, contiguous NCHW, a parameter of masks a layer that
  multiplies its weights, BatchNorm in training mode, weights not frozen, so that their gradients are computed too, the
  penalty a term of the loss, one SGD and a loop of clamps over the parameters.
- tuned_eager: weights frozen, channels_last, autocast, F.batch_norm(weight=mask * gamma) on running statistics; on CUDA
  replayed as a graph, too.
- torch_compile: torch.compile of tuned_eager in its default mode, without a graph.
- mnp_fast: mnp_fast.masked and mnp_fast.ops.mask_step_; on CUDA replayed as a graph, as `mnp_fast.prune` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.environment import whole_float32
from benchmarks.layers import reference, rewrite, use_batch_statistics_
from benchmarks.models import Workload
from mnp_fast import PruneConfig
from mnp_fast.data import logits_of
from mnp_fast.graph.capture import capture
from mnp_fast.masked import Execution, masked
from mnp_fast.ops import mask_step_
from mnp_fast.replay import Recorder, Replayed
from mnp_fast.sites import Site

RATE = PruneConfig.mask_rate
PENALTY = PruneConfig.penalty
DECAY = 0.9


class Step(Protocol):
    """One provider's step on one workload. Each call makes one step on from the last."""

    def __call__(self) -> Tensor:
        """Make a step; returns the cross-entropy before it, a scalar."""

    def gradient(self) -> Tensor:
        """Gradient of the last step's cross-entropy, (neurons,)."""

    def mask(self) -> Tensor:
        """The masks as they are now, (neurons,)."""

    def release(self) -> None:
        """Drop what the last step has left behind."""

    def close(self) -> None:
        """Give back whatever the step holds."""


class Published:
    """Step of published style."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.masks = split(work.mask.clone(), work.sites)
        self.penalties = work.magnitude.split([site.neurons for site in work.sites])
        self.net = use_batch_statistics_(rewrite(work.model, work.sites, self.masks, on_weights=True).eval())
        self.net.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.masks, lr=RATE, momentum=DECAY)

    def __call__(self) -> Tensor:
        self.net.zero_grad()
        loss = F.cross_entropy(logits_of(self.net(self.work.images)), self.work.labels)
        penalty = sum((mask * weight).sum() for mask, weight in zip(self.masks, self.penalties, strict=True))
        (loss + PENALTY * penalty).backward()
        self.optimizer.step()
        with torch.no_grad():
            for mask in self.masks:
                mask.clamp_(0.0, 1.0)
        return loss.detach()

    def gradient(self) -> Tensor:
        gradients = [mask.grad for mask in self.masks if mask.grad is not None]
        return torch.cat(gradients) - PENALTY * self.work.magnitude

    def mask(self) -> Tensor:
        return torch.cat([mask.detach() for mask in self.masks])

    def release(self) -> None:
        self.net.zero_grad()

    def close(self) -> None:
        pass


class Tuned:
    """Step of tuned eager torch, or, with ``compiled``, torch.compile of its forward with loss and of its update."""

    def __init__(self, work: Workload, dtype: torch.dtype, *, compiled: bool = False) -> None:
        self.work, self.dtype, self.compiled = work, dtype, compiled
        self.flat = work.mask.clone()
        # Views of one tensor: gradients come one a layer, and the update is one for all.
        self.masks = split(self.flat, work.sites)
        self.net = frozen(rewrite(work.model, work.sites, self.masks, on_weights=False), self.masks)
        if not compiled:
            _let_projections_fold_(self.net)
        self.images = in_channels_last(work.images)
        self.momentum = torch.zeros_like(self.flat)
        self.pull = PENALTY * work.magnitude
        self.loss: Callable[[], Tensor] = torch.compile(self._loss) if compiled else self._loss
        self.update: Callable[[Tensor], None] = torch.compile(self._update) if compiled else self._update
        self.recorder = None if compiled else _recorder(self.images.device)
        self.step = Replayed(self._step, (self.flat, self.momentum), self.recorder)

    def __call__(self) -> Tensor:
        loss, self.last = self.step()
        return loss

    def _step(self) -> tuple[Tensor, Tensor]:
        loss = self.loss()
        gradient = torch.cat(torch.autograd.grad(loss, self.masks))
        with torch.no_grad():
            self.update(gradient)
        return loss.detach(), gradient

    def _loss(self) -> Tensor:
        with autocast(self.dtype, self.images.device):
            return F.cross_entropy(logits_of(self.net(self.images)).float(), self.work.labels)

    def _update(self, gradient: Tensor) -> None:
        self.momentum.mul_(DECAY).add_(gradient).add_(self.pull)
        self.flat.sub_(RATE * self.momentum).clamp_(0.0, 1.0)

    def gradient(self) -> Tensor:
        return self.last

    def mask(self) -> Tensor:
        return self.flat

    def release(self) -> None:
        del self.last, self.step
        self.step = Replayed(self._step, (self.flat, self.momentum), self.recorder)

    def close(self) -> None:
        del self.step
        if self.compiled:
            torch.compiler.reset()


class MnpFast:
    """Step of this package."""

    def __init__(self, work: Workload, dtype: torch.dtype) -> None:
        self.work = work
        self.flat = work.mask.clone().requires_grad_()
        self.momentum = torch.zeros_like(work.mask)
        self.images = in_channels_last(work.images)
        self.undo = ExitStack()
        model = copy.deepcopy(work.model)
        self.net = masked_network(self.undo, model, work.sites, self.flat, self.images, dtype)
        self.recorder = _recorder(self.images.device)
        self.step = Replayed(self._step, (self.flat, self.momentum), self.recorder)

    def __call__(self) -> Tensor:
        loss, self.last = self.step(self.images, self.work.labels)
        return loss

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(self.net(images).float(), labels)
        (gradient,) = torch.autograd.grad(loss, self.flat)
        mask_step_(self.flat, self.momentum, gradient, self.work.magnitude, rate=RATE, decay=DECAY, penalty=PENALTY)
        return loss.detach(), gradient

    def gradient(self) -> Tensor:
        return self.last

    def mask(self) -> Tensor:
        return self.flat.detach()

    def release(self) -> None:
        # A graph holds its memory from one replay to the next: the next call captures anew, where memory is measured.
        del self.last, self.step
        self.step = Replayed(self._step, (self.flat, self.momentum), self.recorder)

    def close(self) -> None:
        # Before the weights that a graph reads.
        del self.step
        self.undo.close()


def _recorder(device: torch.device) -> Recorder | None:
    return Recorder(device) if device.type == "cuda" else None


def masked_network(
    stack: ExitStack,
    model: nn.Module,
    sites: Sequence[Site],
    mask: Tensor,
    images: Tensor,
    dtype: torch.dtype,
) -> Callable[[Tensor], Tensor]:
    """The model under its masks until ``stack`` is left, as a function of images that gives logits."""
    how = Execution(capture(model, sites, images), None if dtype == torch.float32 else dtype)
    if how.captured is None or how.captured.reason is not None:
        raise SystemExit(f"the graph level does not run here: {how.captured and how.captured.reason}")
    net = stack.enter_context(masked(model, sites, mask, how=how))
    return lambda x: logits_of(net(x))


def steps(work: Workload, dtype: torch.dtype, names: Sequence[str]) -> Iterator[tuple[str, Step]]:
    """(name, step) of each provider."""
    for name in names:
        if name == "published":
            yield name, Published(work)
        elif name == "mnp_fast":
            yield name, MnpFast(work, dtype)
        else:
            yield name, Tuned(work, dtype, compiled=name == "torch_compile")


# ---------------------------------------------------------------- the check
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative to the reference's."""
GRADIENT_TOLERANCE = 1e-3
"""In float32: L2 norm of the difference over that of the reference."""
RATIO = 2.0
"""In narrower precision (TF32 too): error of the gradient over that of tuned_eager, whose own float32 must match."""


class Check:
    """The references of a workload, in float32, and the comparison of a provider's first step with its own.

    published: batch statistics; all others: running statistics. Both by functional_call with masked weights. How far
    rounding to bfloat16 moves a gradient depends on the network, so that there plain torch sets the limit.
    """

    def __init__(self, work: Workload, names: Sequence[str], dtype: torch.dtype) -> None:
        self.work, self.dtype = work, dtype
        self.expected = {}
        for published in {name == "published" for name in names}:
            # Published style runs, and is measured, as torch does float32 by itself.
            with nullcontext() if published else whole_float32():
                self.expected[published] = reference(
                    work.model, work.sites, work.mask, work.images, work.labels, batch_statistics=published
                )
        self.limit = GRADIENT_TOLERANCE
        self.plain_is_right = True
        self.plain_error: float | None = None
        if False in self.expected and (dtype != torch.float32 or work.images.device.type == "cuda"):
            exact, plain = Tuned(work, torch.float32), Tuned(work, dtype)
            with whole_float32():
                loss_error, gradient_error = self.errors("tuned_eager", exact, float(exact()))
            self.plain_error = gradient_error
            self.plain_is_right = loss_error <= LOSS_TOLERANCE[torch.float32] and gradient_error <= GRADIENT_TOLERANCE
            self.limit = RATIO * self.errors("tuned_eager", plain, float(plain()))[1] + GRADIENT_TOLERANCE

    def errors(self, name: str, step: Step, loss: float) -> tuple[float, float]:
        """Of the loss, and of the gradient, of the first step that ``step`` has made, with this loss."""
        return relative_errors(loss, step.gradient(), *self.expected[name == "published"])

    def __call__(self, name: str, step: Step, loss: float) -> dict[str, bool | float | None]:
        """match, loss_error and gradient_error of the first step that ``step`` has made, with this loss."""
        published = name == "published"
        loss_error, gradient_error = self.errors(name, step, loss)
        pull = step.gradient() + PENALTY * self.work.magnitude
        moved = torch.allclose(step.mask(), (self.work.mask - RATE * pull).clamp(0.0, 1.0), atol=1e-6)
        # Written so that NaN is no match.
        match = (
            loss_error <= LOSS_TOLERANCE[torch.float32 if published else self.dtype]
            and gradient_error <= (GRADIENT_TOLERANCE if published else self.limit)
            and (published or self.plain_is_right)
            and moved
        )
        return {
            "match": match,
            "loss_error": float(f"{loss_error:.3g}"),
            "gradient_error": float(f"{gradient_error:.3g}"),
            "plain_float32_error": None if published or self.plain_error is None else float(f"{self.plain_error:.3g}"),
        }


def relative_errors(loss: float, gradient: Tensor, expected_loss: float, expected: Tensor) -> tuple[float, float]:
    """(of the loss, of the gradient in L2)."""
    return abs(loss - expected_loss) / abs(expected_loss), float((gradient - expected).norm() / expected.norm())


# ---------------------------------------------------------------- shared with the benchmark of whole runs
def split(flat: Tensor, sites: Sequence[Site]) -> list[nn.Parameter]:
    """Parameters of masks, one a site, all views of ``flat``."""
    return [nn.Parameter(part) for part in flat.split([site.neurons for site in sites])]


def frozen(net: nn.Module, masks: Sequence[nn.Parameter]) -> nn.Module:
    """``net`` in eval mode and channels_last, where nothing but the masks takes a gradient."""
    to_channels_last(net).eval().requires_grad_(False)
    for mask in masks:
        mask.requires_grad_(True)
    return net


def _let_projections_fold_(net: nn.Module) -> None:
    """Input projections of torch's attention take a gradient, which is asked for by nobody and so not computed.

    Eager torch multiplies a frozen weight with their transposed input by bmm rather than mm: on a CPU in bfloat16 a
    step of ViT-B/16 then took 8.2 s instead of 0.45 s (batch 2, two cores).
    """
    for module in net.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            module.in_proj_weight.requires_grad_(True)


def to_channels_last(net: nn.Module) -> nn.Module:
    """``net`` itself, its filters in channels_last memory."""
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def in_channels_last(images: Tensor) -> Tensor:
    """Pictures (b, c, h, w) in channels_last memory."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Mixed precision in ``dtype``; float32: none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
