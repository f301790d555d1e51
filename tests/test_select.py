"""Selection: bisection against trying every count, the paired test against sums by hand, the counts against copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from networks import snapshot
from test_optimize import quadrants, small, taught
from torch import Tensor

from mnp_fast import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import prune_
from mnp_fast.select import Selection, _drop, drop_above, select, smallest
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

        assert smallest(holds, last) == min(start, last + 1)
        assert all(0 <= count <= last for count in asked)
        assert len(asked) == len(set(asked)) <= math.ceil(math.log2(last + 2))


def test_bisection_where_the_answer_goes_up_and_down() -> None:
    for pattern in range(2**8):
        found = smallest(lambda count, pattern=pattern: bool(pattern >> count & 1), 7)
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
    lost, won = int((one & ~other).sum()), int((~one & other).sum())
    assert _drop(lost, won, len(one)) == pytest.approx(drop - error)
    assert _drop(won, lost, len(one)) == pytest.approx(-drop - error)


def test_the_error_is_that_of_the_mean_of_differences() -> None:
    one, other = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) > 0.3
    differences = one.double() - other.double()
    expected = float(differences.mean()) - float(differences.std(correction=0)) / math.sqrt(500)
    assert _drop(int((one & ~other).sum()), int((~one & other).sum()), 500) == pytest.approx(expected)


def dearest(before: list[Tensor], after: list[Tensor]) -> float:
    """Drop less error on the first set or on all, whichever is more, from the differences themselves."""
    differences = [was.double() - now.double() for was, now in zip(before, after, strict=True)]
    parts = [differences[0], torch.cat(differences)]
    return max(float(d.mean()) - float(d.std(correction=0)) / math.sqrt(len(d)) for d in parts)


def test_the_error_grows_with_losses_and_falls_with_gains() -> None:
    # What makes an early answer certain.
    for n in (1, 2, 7, 30):
        for lost in range(n + 1):
            for won in range(n - lost):
                assert _drop(lost, won + 1, n) <= _drop(lost, won, n) + 1e-12
                assert _drop(lost + 1, won, n) >= _drop(lost, won, n) - 1e-12


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("limit", [0.0, 0.02, 0.05, 0.15])
def test_an_early_answer_is_the_whole_answer(limit: float, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    read = 0
    for harm in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        for _ in range(10):
            before = [torch.rand(n, generator=generator) < 0.9 for n in (40, 160)]
            after = [torch.where(torch.rand(len(b), generator=generator) < harm, ~b, b) for b in before]

            def parts(after: list[Tensor] = after) -> Iterator[Tensor]:
                nonlocal read
                for data in after:
                    for part in data.split(batch):
                        read += len(part)
                        yield part

            assert drop_above(limit, before, parts()) == (dearest(before, after) > limit)
    assert read < 0.8 * 70 * 200


# ---------------------------------------------------------------- selection
class Case:
    """A network that knows the quadrants; random masks, four of them one; noisy held-back pictures."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(0)
        self.model = taught(small())
        generator = torch.Generator().manual_seed(seed)
        held = quadrants(80, 3)
        self.learning = quadrants(120, 2)
        self.held = DefenceSet(held.images + 0.8 * torch.randn(80, 1, 6, 6, generator=generator), held.labels)
        self.sites = find_sites(self.model, self.held.images[:2])
        self.mask = 0.01 + 0.9 * torch.rand(16, generator=generator)
        self.mask[torch.randperm(16, generator=generator)[:4]] = 1.0

    @property
    def order(self) -> Tensor:
        return self.mask.argsort(stable=True)

    def select(self, limit: float, **options: float) -> Selection:
        before = snapshot(self.model)
        config = replace(CONFIG, **options)
        chosen = select(self.mask, self.order, self.model, self.sites, self.learning, self.held, limit, config)
        assert snapshot(self.model) == before
        return chosen

    def right(self, data: DefenceSet, count: int) -> Tensor:
        """By a plain pruned copy."""
        network = copy.deepcopy(self.model)
        keep = torch.ones(16, dtype=torch.bool)
        keep[self.order[:count]] = False
        prune_(network, self.sites, keep)
        with torch.no_grad():
            return torch.cat([network(x) for x, _ in data.batches(40)]).argmax(1) == data.labels

    def cost(self, count: int) -> float:
        """Drop less error, on the held-back pictures or on all, whichever is more."""
        return dearest(*([self.right(data, n) for data in (self.held, self.learning)] for n in (0, count)))


def check(case: Case, chosen: Selection) -> int:
    """How many are pruned: the first of the order and no others, and the threshold says the same."""
    count = int((~chosen.keep).sum())
    assert chosen.keep.dtype == torch.bool
    assert sorted(case.order[:count].tolist()) == (~chosen.keep).nonzero().flatten().tolist()
    if count:
        assert chosen.threshold == float(case.mask[~chosen.keep].max())
        assert bool((case.mask[chosen.keep] >= chosen.threshold).all())
        assert chosen.threshold < 1
    else:
        assert chosen.threshold == -1
    return count


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [0.0, 0.03, 0.1, 0.4])
def test_accuracy_sets_the_limit(seed: int, limit: float) -> None:
    case = Case(seed)
    chosen = case.select(limit, threshold=0.9)
    count = check(case, chosen)
    assert chosen.low == int((case.mask <= 0.9).sum())
    assert count == chosen.pruned <= chosen.low
    assert case.cost(count) <= limit
    assert count == chosen.low or case.cost(count + 1) > limit


def test_without_candidates_nothing_is_pruned() -> None:
    case = Case(0)
    case.mask = torch.ones(16)
    assert check(case, case.select(1.0)) == 0


def test_a_mask_of_one_is_never_pruned() -> None:
    case = Case(1)
    case.mask = torch.ones(16)
    case.mask[[3, 9]] = 0.0
    chosen = case.select(1.0)
    assert bool(chosen.keep[case.mask == 1].all())
    assert check(case, chosen) == 2
