"""What every baseline starts from and gives back, and the one rule by which all of them choose how much to prune."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mnp_fast.config import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.device import peak_mb, product_dtype
from mnp_fast.graph.capture import capture
from mnp_fast.masked import Execution, prune_
from mnp_fast.memory import kept
from mnp_fast.optimize import suppress_
from mnp_fast.progress import Progress
from mnp_fast.select import select
from mnp_fast.sites import Site, find_sites, site_parameter, total_neurons

BUDGET = 0.1
"""Accuracy that pruning may cost before fine-tuning, the same for all: acc_ratio of BackdoorBench's ANP, RNP and FP."""
UNLEARNED = 0.2
"""Unlearning ends at this share of the accuracy at first, where RNP has an accuracy of .2 and TSBD one of .1."""

Order = tuple[Tensor, Tensor]
"""(score (neurons,) float32, order (k,) int64 of the neurons that may be pruned, the first to go first)."""


@dataclass(frozen=True)
class Repair:
    """A repaired copy and how it came about.

    model: in eval mode. score, order: see `Order`, on the CPU; None where nothing is ranked. pruned: how many were, of
    ``neurons``. stages: seconds of each. peak_mb: of the process so far; on a GPU, of the repair. verdict,
    suspected_target, evidence: of methods that judge.
    """

    model: nn.Module
    score: Tensor | None
    order: Tensor | None
    pruned: int
    neurons: int
    seconds: float
    stages: dict[str, float]
    peak_mb: float
    verdict: str | None = None
    suspected_target: int | None = None
    evidence: dict[str, Any] | None = None


class Run:
    """One run of a baseline: the model's sites, the split of the defence set, and how models are run.

    model: never changed; what is computed is on its device. data: clean pictures as the network takes them; split as
    `mnp_fast.prune` splits them for the same seed, so that all methods learn from the same pictures and are held to the
    same others.
    """

    def __init__(self, model: nn.Module, data: DefenceSet, seed: int, config: PruneConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        data = data.on(self.device)
        self.learning, self.held = data.split(config.held_back, self.generator)
        self.plain = self.working_copy()
        self.sites = find_sites(self.plain, data.images[:2])
        self.neurons = total_neurons(self.sites)
        captured = capture(self.plain, self.sites, data.images[:2])
        self.how = Execution(captured, product_dtype(config.precision, self.device))
        self.stages: dict[str, float] = {}

    def working_copy(self) -> nn.Module:
        """A copy in float32, in eval mode, every weight trainable."""
        return copy.deepcopy(self.model).float().eval().requires_grad_(True)

    @cached_property
    def unlearned(self) -> nn.Module:
        """A copy that has lost its clean function, to `UNLEARNED` of its accuracy.

        By the clean suppression of `mnp_fast.optimize`: the objective of RNP and TSBD, with steps of a length that
        adapts, where their fixed rates destroy some networks and leave others as they were.
        """
        model = self.working_copy()
        config = replace(self.config, suppression_stop=UNLEARNED)
        with torch.enable_grad():
            suppress_(model, self.learning, config, self.generator, Progress(False), self.how)
        return model

    def narrow(self, sites: tuple[Site, ...]) -> None:
        """Prune, and count, neurons of these sites alone; the network runs module by module from here on."""
        self.sites, self.neurons = sites, total_neurons(sites)
        self.how = replace(self.how, captured=None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stages[name] = time.perf_counter() - start

    def affordable(self, order: Tensor) -> Tensor:
        """The shared rule: keep (neurons,) bool, without the most neurons along the order that `BUDGET` allows.

        The bisection of `mnp_fast.select`, for every method: the paired drop of accuracy less its standard error, on
        the held-back pictures and on all.
        """
        candidates = torch.ones(self.neurons, device=self.device).index_fill_(0, order, 0.0)
        config = replace(self.config, threshold=0.0)
        both = (self.learning, self.held)
        return select(candidates, order, self.plain, self.sites, *both, BUDGET, config, self.how).keep


def ranked(score: Tensor) -> Order:
    """All neurons, the lowest score first; equal scores in the order of the network."""
    return score, score.argsort(stable=True)


Rank = Callable[[Run], Order]
Rule = Callable[[Run, Order], Tensor]
Restore = Callable[[Run, nn.Module, Tensor], None]


def shared_rule(run: Run, ranking: Order) -> Tensor:
    """`Run.affordable`, whatever the scores."""
    return run.affordable(ranking[1])


def prune_kept(run: Run, working: nn.Module, keep: Tensor) -> None:
    """Pruning alone: what the methods do that do not fine-tune."""
    prune_(working, run.sites, keep)


@dataclass(frozen=True)
class Method:
    """A baseline, as a function of (model, defence set, seed, settings).

    rank: orders the neurons; None where none are pruned. rule: keep (neurons,) bool from the ranking. restore_: changes
    a working copy in place, given what is kept.
    """

    rank: Rank | None
    restore_: Restore = prune_kept
    rule: Rule = shared_rule

    def __call__(self, model: nn.Module, data: DefenceSet, seed: int = 0, config: PruneConfig | None = None) -> Repair:
        start = time.perf_counter()
        with kept(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            device = next(model.parameters()).device
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            run = Run(model, data, seed, config or PruneConfig())
            score, order, keep = None, None, torch.ones(run.neurons, dtype=torch.bool, device=device)
            if self.rank is not None:
                with run.stage("rank"):
                    score, order = self.rank(run)
                with run.stage("select"):
                    keep = self.rule(run, (score, order))
                score, order = score.cpu(), order.cpu()
            working = run.working_copy()
            with run.stage("repair"):
                self.restore_(run, working, keep)
        repaired = copy.deepcopy(model).eval()
        repaired.load_state_dict(working.state_dict())
        seconds, peak = time.perf_counter() - start, peak_mb(device)
        return Repair(repaired, score, order, int((~keep).sum()), run.neurons, seconds, run.stages, peak)


def filters(model: nn.Module, site: Site) -> list[tuple[nn.Parameter, Tensor]]:
    """The weights that make the neurons of a site: (parameter, rows (neurons, k) of its dim 0) for each source.

    Where the sources are not known, the parameter that pruning sets to zero: transposed for mlp and heads, a view.
    """
    if site.sources:
        weights = [site_parameter(model, source.path, source.parameter)[1] for source in site.sources]
        return [
            (weight, torch.tensor(list(source.rows), device=weight.device).view(site.neurons, -1))
            for weight, source in zip(weights, site.sources, strict=True)
        ]
    weight: Any = site_parameter(model, site.path, site.parameter)[1]
    if site.kind in ("mlp", "heads"):
        weight = weight.transpose(0, 1)
    return [(weight, torch.arange(site.neurons * site.repeat, device=weight.device).view(site.neurons, -1))]
