"""The modules that run in the place of a trace's nodes: the fused ops, with their weights and their mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnp_fast.ops import masked_act, masked_affine, masked_batch_norm, samples
from mnp_fast.sites import Site, columns


class Affine(nn.Module):
    def __init__(
        self,
        mask: Callable[[], Tensor] | None,
        scale: Tensor,
        center: Tensor,
        shift: Tensor,
        act: str,
        channel_dim: int = 1,
        repeat: int = 1,
    ) -> None:
        super().__init__()
        ones = torch.ones_like(scale)
        self.mask = mask or (lambda: ones)
        self.vectors = (scale, center, shift)
        self.act, self.channel_dim, self.repeat = act, channel_dim, repeat

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        mask = samples.repeated(self.mask(), self.repeat)
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        return masked_affine(x, mask, *self.vectors, residual, channel_dim=self.channel_dim, act=self.act)


class TrainedAffine(nn.Module):
    """BatchNorm with running statistics whose gamma and beta are being trained."""

    def __init__(self, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, act: str) -> None:
        super().__init__()
        self.weights = (gamma, beta)
        self.center, self.rstd, self.ones, self.act = mean.clone(), torch.rsqrt(var + eps), torch.ones_like(mean), act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gamma, beta = self.weights
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        return masked_affine(x, gamma, self.rstd, self.center, beta, residual, act=self.act)


class BatchNorm(nn.Module):
    """BatchNorm with the statistics of the batch; its gamma and beta are trained where nothing is masked."""

    def __init__(self, mask: Callable[[], Tensor] | None, gamma: Tensor, beta: Tensor, eps: float, act: str) -> None:
        super().__init__()
        ones = torch.ones_like(gamma)
        self.mask = mask or (lambda: ones)
        self.weights, self.eps, self.act = (gamma, beta), eps, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        return masked_batch_norm(x, self.mask(), *self.weights, residual, eps=self.eps, act=self.act)


class Act(nn.Module):
    def __init__(self, mask: Callable[[], Tensor], act: str) -> None:
        super().__init__()
        self.mask, self.act = mask, act

    def forward(self, x: Tensor) -> Tensor:
        return masked_act(x, self.mask(), act=self.act)


class MaskedWeight(nn.Module):
    def __init__(self, mask: Callable[[], Tensor], site: Site) -> None:
        super().__init__()
        self.mask, self.site = mask, site

    def forward(self, weight: Tensor) -> Tensor:
        return weight * columns(self.site, self.mask())
