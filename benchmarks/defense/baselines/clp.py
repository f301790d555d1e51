"""CLP (Zheng et al., arXiv 2208.03111): prune channels whose Lipschitz constant stands out of their layer. Data-free.

"clp_sigma" prunes as the paper does, all beyond mean + u sigma, u = 3; "clp" prunes along the same order by the rule
that all methods share. beta stays, as with every method here; the authors' code sets it to zero too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.defense.baselines.common import Method, Order, Run, filters, ranked
from mnp_fast.sites import Site, site_parameter

SIGMAS = 3.0


@torch.no_grad()
def lipschitz(model: nn.Module, site: Site) -> Tensor:
    """Upper bound of each neuron's Lipschitz constant, (site.neurons,): spectral norm of its filter, (in, kh kw), times
    |gamma| / sqrt(running variance + eps) of its BatchNorm."""
    parts = []
    for weight, rows in filters(model, site):
        own = weight[rows]  # (neurons, k, in, kh, kw) or (neurons, k, in)
        if own.dim() == 2:
            own = own.unsqueeze(-1)
        parts.append(own.flatten(1, 2).flatten(2) if own.dim() > 3 else own)
    # On the CPU: a GPU would take thousands of small matrices one by one.
    bound = torch.stack([torch.linalg.matrix_norm(part.cpu(), ord=2) for part in parts]).sum(0).to(parts[0].device)
    if site.kind == "batch_norm" and site.sources:
        module, gamma = site_parameter(model, site.path, site.parameter)
        variance = module._buffers.get("running_var")
        scale = gamma.abs()
        bound = bound * (scale if variance is None else scale / (variance + module.eps).sqrt())  # type: ignore[operator]
    return bound


def deviations(model: nn.Module, site: Site) -> Tensor:
    """Sigmas by which each constant is above the mean of its layer."""
    bound = lipschitz(model, site)
    if len(bound) < 2:
        return torch.zeros_like(bound)
    return (bound - bound.mean()) / bound.std().clamp_min(torch.finfo(bound.dtype).tiny)


def rank(run: Run) -> Order:
    """The neurons that stand out most first: a score is minus the sigmas."""
    return ranked(-torch.cat([deviations(run.plain, site) for site in run.sites]))


def beyond_sigmas(run: Run, ranking: Order) -> Tensor:
    """The paper's rule."""
    return ranking[0] >= -SIGMAS


repair = Method(rank)
repair_by_sigmas = Method(rank, rule=beyond_sigmas)
