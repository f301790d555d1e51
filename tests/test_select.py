"""Selection: bisection against trying every count, the paired test against sums by hand, the counts against copies."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from networks import snapshot
from test_optimize import quadrants, small, taught
from torch import Tensor, nn

from mnp_fast import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import prune_
from mnp_fast.select import _first, paired_drop, select
from mnp_fast.sites import find_sites

CONFIG = PruneConfig(batch_size=40)


# ---------------------------------------------------------------- bisection
@pytest.mark.parametrize("last", range(18))
def test_bisection_against_trying_every_count(last: int) -> None:
    for start in range(last + 3):
        asked: list[int] = []

        def holds(count: int, start: int = start, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= start

        assert _first(holds, last) == min(start, last + 1)
        assert all(0 <= count <= last for count in asked)
        assert len(asked) == len(set(asked)) <= math.ceil(math.log2(last + 2))


def test_bisection_where_the_answer_goes_up_and_down() -> None:
    for pattern in range(2**8):
        found = _first(lambda count, pattern=pattern: bool(pattern >> count & 1), 7)
        assert found == 8 or pattern >> found & 1
        assert found == 0 or not pattern >> (found - 1) & 1


# ---------------------------------------------------------------- paired difference
@pytest.mark.parametrize(
    ("before", "after", "drop", "error"),
    [
        ("1111111100", "1111111100", 0.0, 0.0),
        ("1111111111", "0000000000", 1.0, 0.0),
        ("1111111100", "1111100010", 0.2, math.sqrt(4 - 10 * 0.04) / 10),  # three lost, one won
        ("1100", "0011", 0.0, 0.5),  # two lost, two won
        ("0011", "1011", -0.25, math.sqrt(1 - 4 / 16) / 4),
    ],
)
def test_paired_drop(before: str, after: str, drop: float, error: float) -> None:
    one, other = (torch.tensor([c == "1" for c in text]) for text in (before, after))
    assert paired_drop(one, other) == pytest.approx((drop, error))
    assert paired_drop(other, one) == pytest.approx((-drop, error))


def test_the_error_is_that_of_the_mean_of_differences() -> None:
    one, other = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) > 0.3
    differences = one.double() - other.double()
    expected = float(differences.mean()), float(differences.std(correction=0)) / math.sqrt(500)
    assert paired_drop(one, other) == pytest.approx(expected)


# ---------------------------------------------------------------- selection
class Case:
    """A network that knows the quadrants, and a copy of it that puts most pictures into class 2."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(0)
        self.model = taught(small())
        self.suppressed = copy.deepcopy(self.model)
        with torch.no_grad():
            self.suppressed[9].weight[2, :16] += 2.0  # four neurons of the second site shout class 2
        self.learning, self.held = quadrants(120, 2), quadrants(80, 3)
        self.sites = find_sites(self.model, self.held.images[:2])
        generator = torch.Generator().manual_seed(seed)
        self.mask = torch.rand(16, generator=generator)
        self.mask[torch.randperm(16, generator=generator)[:4]] = 1.0
        self.order = self.mask.argsort(stable=True)

    def select(self, target: int | None, config: PruneConfig = CONFIG, mask: Tensor | None = None):  # type: ignore[no-untyped-def]
        networks = self.model, self.suppressed
        mask = self.mask if mask is None else mask
        return select(mask, self.order, *networks, self.sites, self.learning, self.held, target, config)

    def predictions(self, network: nn.Module, data: DefenceSet, count: int, batch_statistics: bool) -> Tensor:
        """By a plain pruned copy, in training mode for batch statistics."""
        network = copy.deepcopy(network)
        keep = torch.ones(16, dtype=torch.bool)
        keep[self.order[:count]] = False
        prune_(network, self.sites, keep)
        for module in network.modules():
            module.training = batch_statistics and isinstance(module, nn.BatchNorm2d)
        with torch.no_grad():
            return torch.cat([network(x) for x, _ in data.batches(40)]).argmax(1)

    def cost(self, count: int) -> float:
        right, now = (self.predictions(self.model, self.held, n, False) == self.held.labels for n in (0, count))
        drop, error = paired_drop(right, now)
        return drop - error

    def share(self, count: int, target: int) -> float:
        return float((self.predictions(self.suppressed, self.learning, count, True) == target).float().mean())


def is_last(within: int, last: int, affordable: list[bool]) -> bool:
    """Whether a search could end at ``within``: it can be paid for, the count after it cannot."""
    return affordable[within] and (within == last or not affordable[within + 1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [None, 2])
def test_select_against_pruned_copies(seed: int, target: int | None) -> None:
    case, last = Case(seed), 12
    config = replace(CONFIG, accuracy_budget=0.05, accuracy_limit=0.4, release_share=0.3)
    networks = case.model, case.suppressed
    before = [snapshot(network) for network in networks]
    chosen = case.select(target, config)
    assert [snapshot(network) for network in networks] == before
    costs = [case.cost(count) for count in range(last + 1)]
    budget = 0.05 if target is not None else 0.0
    assert is_last(chosen.within_budget, last, [cost <= budget for cost in costs])
    count = chosen.within_budget
    if target is None:
        assert chosen.released is None
    else:
        released = [case.share(count, target) <= 0.3 for count in range(last + 1)]
        assert chosen.within_limit >= chosen.within_budget
        assert costs[chosen.within_limit] <= 0.4
        if chosen.released is None:
            assert not released[chosen.within_limit]
        else:
            assert released[chosen.released]
            assert chosen.released == 0 or not released[chosen.released - 1]
            count = max(count, chosen.released)
    # Nested: the first neurons of the order are gone and no others, and the threshold says the same.
    assert chosen.keep.dtype == torch.bool
    assert sorted(case.order[:count].tolist()) == (~chosen.keep).nonzero().flatten().tolist()
    if count:
        assert chosen.threshold == float(case.mask[~chosen.keep].max())
        assert bool((case.mask[chosen.keep] >= chosen.threshold).all())
    else:
        assert chosen.threshold == -1


def test_the_budget_binds() -> None:
    case = Case(0)
    wide, narrow = (
        case.select(2, replace(CONFIG, accuracy_budget=budget, accuracy_limit=budget, release_share=0))
        for budget in (1.0, 0.0)
    )
    assert int((~wide.keep).sum()) == 12  # everything below one
    assert 0 <= int((~narrow.keep).sum()) < 12
    assert case.cost(int((~narrow.keep).sum())) <= 0
    assert not bool((wide.keep & ~narrow.keep).any())


@pytest.mark.parametrize("target", [None, 2])
def test_without_candidates_nothing_is_pruned(target: int | None) -> None:
    chosen = Case(0).select(target, mask=torch.ones(16))
    assert bool(chosen.keep.all())
    assert chosen.threshold == -1


@pytest.mark.parametrize("target", [None, 2])
def test_a_mask_of_one_is_never_pruned(target: int | None) -> None:
    case = Case(1)
    chosen = case.select(target, replace(CONFIG, accuracy_budget=1, accuracy_limit=1))
    assert bool(chosen.keep[case.mask == 1].all())
    assert chosen.threshold < 1
