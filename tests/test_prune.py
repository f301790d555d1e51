"""prune and scan: what may be passed, what stays as it was, what comes back; a backdoor of the digits repaired."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import snapshot
from test_optimize import quadrants, small, taught
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mnp_fast
from benchmarks import digits
from mnp_fast import ConfigError, DataError, MnpFastError, ModelError, PruneConfig, PruneResult, device, optimize
from mnp_fast import run as run_module
from mnp_fast.data import DefenceSet, collect, logits_of
from mnp_fast.detect import Look
from mnp_fast.graph.trace import Captured
from mnp_fast.masked import prune_
from mnp_fast.ops.cpu_backend import usable_isas
from mnp_fast.sites import find_sites
from mnp_fast.waves import Wave

SHORT = PruneConfig(
    batch_size=40,
    suppression_stop=0.4,
    suppression_rate=0.02,
    perturbations=2,
    perturbation_steps=5,
    alpha=0.7,
    mask_steps=25,
    finetune_epochs=2,
    suspicion_score=1,
    evidence_score=1,
)
ALWAYS = replace(SHORT, evidence_score=0, suspicion_score=0)  # always a suspect, so that something is pruned
prune_module = sys.modules["mnp_fast.prune"]  # the package has a function of that name
LOOK, REPAIR = ("suppress", "search", "weigh"), ("perturb", "masks", "select", "fine-tune")
LOOKS = (*LOOK, *(f"{name}-2" for name in LOOK), *(f"{name}-3" for name in LOOK))
NAMES = (*LOOKS, *REPAIR)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    data = quadrants()
    return DataLoader(TensorDataset(data.images, data.labels), batch_size=50)


def batch() -> tuple[Tensor, Tensor]:
    data = quadrants()
    return data.images.clone(), data.labels.clone()


def run(model: nn.Module, given: Any = None, config: PruneConfig = ALWAYS, **options: Any) -> PruneResult:
    return mnp_fast.prune(model, loader() if given is None else given, config, **{"progress": False} | options)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return taught(small())


@pytest.fixture
def model(original: nn.Module) -> nn.Module:
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def usual(original: nn.Module) -> PruneResult:
    result = run(original)
    assert any(result.pruned.values())
    return result


def state(result: PruneResult) -> dict[str, Tensor]:
    assert result.model is not None
    return dict(result.model.state_dict())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, names aside."""
    pairs = zip(a.values(), b.values(), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def same(one: PruneResult, other: PruneResult) -> bool:
    """Masks, pruned neurons, threshold, verdict and weights bit for bit; names of sites and weights may differ."""
    return (
        equal(one.masks, other.masks)
        and list(one.pruned.values()) == list(other.pruned.values())
        and (one.threshold, one.verdict, one.evidence) == (other.threshold, other.verdict, other.evidence)
        and equal(state(one), state(other))
    )


# ---------------------------------------------------------------- what comes back
def test_result(model: nn.Module, usual: PruneResult) -> None:
    result = usual
    assert type(result.model) is type(model)
    assert state(result).keys() == model.state_dict().keys()
    assert not any(module.training for module in result.model.modules())
    assert [type(module) for module in result.model.modules()] == [type(module) for module in model.modules()]
    assert not {p.data_ptr() for p in result.model.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all("forward" not in module.__dict__ for module in result.model.modules())
    fresh = small().eval()
    fresh.load_state_dict(state(result))
    images = quadrants(seed=4).images
    assert torch.equal(fresh(images), result.model(images))
    sites = find_sites(model, images[:2])
    assert [site.path for site in sites] == list(result.masks) == list(result.pruned)
    for site in sites:
        mask, gone = result.masks[site.path], result.pruned[site.path]
        assert mask.shape == (site.neurons,)
        assert bool(((mask >= 0) & (mask <= 1)).all())
        assert bool((mask[gone] <= result.threshold).all())
        weight = fresh.get_parameter(f"{site.path}.weight")
        assert not weight[gone].any()
        assert weight.count_nonzero() == site.neurons - len(gone)


def test_history(usual: PruneResult) -> None:
    assert [entry["stage"] for entry in usual.history] == list(NAMES)
    for entry in usual.history:
        if entry["stage"].rstrip("-23") not in ("search", "weigh", "perturb"):
            assert math.isfinite(entry["loss"])
            assert 0 <= entry["accuracy"] <= 1
        assert 0 < entry["seconds"] < 60
        assert entry["peak_mb"] > 10
    peaks = [entry["peak_mb"] for entry in usual.history]
    assert peaks == sorted(peaks)  # of the process so far
    assert usual.history[0]["accuracy"] <= 0.4
    assert usual.history[-2]["pruned"] == sum(map(len, usual.pruned.values()))


def test_scan_says_what_prune_says(model: nn.Module, usual: PruneResult) -> None:
    before = snapshot(model)
    found = mnp_fast.scan(model, loader(), ALWAYS, progress=False)
    assert snapshot(model) == before
    assert (found.verdict, found.suspected_target) == (usual.verdict, usual.suspected_target)
    assert found.evidence == usual.evidence
    assert (found.run["sites"], found.run["neurons"], found.run["classes"]) == (2, 16, 4)
    assert [entry["stage"] for entry in found.history] == list(LOOKS)


def test_without_finetuning_only_pruned_weights_change(model: nn.Module) -> None:
    result = run(model, config=replace(ALWAYS, finetune_epochs=0))
    assert [entry["stage"] for entry in result.history] == list(NAMES[:-1])
    keep = torch.ones(16, dtype=torch.bool)
    keep[torch.tensor(result.pruned["1"] + [8 + i for i in result.pruned["4"]])] = False
    assert not keep.all()
    prune_(model, find_sites(model, quadrants().images[:2]), keep)
    assert equal(state(result), dict(model.state_dict()))


def test_where_nothing_is_pruned_the_model_is_finetuned_all_the_same(model: nn.Module) -> None:
    config = replace(SHORT, mask_steps=1, mask_rate=1e-9, penalty=0)
    result = run(model, config=config)
    assert not any(result.pruned.values())
    assert result.threshold == -1
    assert result.suspected_target is None
    assert not equal(state(result), dict(model.state_dict()))
    assert [entry["stage"] for entry in result.history] == [*LOOK, *REPAIR]
    result = run(model, config=replace(config, finetune_epochs=0))
    assert equal(state(result), dict(model.state_dict()))
    assert result.metrics["clean_accuracy_after"] == result.metrics["clean_accuracy_before"]


def test_far_from_suspicion_the_model_stays_as_it_is(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = run_module.weigh
    monkeypatch.setattr(
        run_module,
        "weigh",
        lambda *args: replace(inner(*args), perturbed_share=0.4, transferred_share=0.0, searched_share=0.8),
    )
    result = run(model, config=SHORT)
    assert result.evidence["score"] == 0.4
    assert result.suspected_target is None
    assert result.run["repair_strength"] == 0
    assert equal(state(result), dict(model.state_dict()))
    assert result.model is not model
    assert all(bool((mask == 1).all()) for mask in result.masks.values())
    assert [len(mask) for mask in result.masks.values()] == [8, 8]
    assert not any(result.pruned.values())
    assert result.threshold == -1
    assert [entry["stage"] for entry in result.history] == list(LOOK)  # a second could not make a class suspicious
    assert result.metrics["clean_accuracy_after"] == result.metrics["clean_accuracy_before"]


SUSPECTED = replace(SHORT, suspicion_score=0.55)


@pytest.mark.parametrize(
    ("config", "towards"), [(ALWAYS, [[2] * 4]), (SUSPECTED, [[2, 3, 2, 3]]), (SHORT, [[3, 2], [3, 2]])]
)
def test_repaired_with_the_suspect_or_else_gently_with_the_class_that_was_searched(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, config: PruneConfig, towards: list[list[int]]
) -> None:
    """Class 3 is pulled into best in the search, class 2 is the commonest and pulled into best for evidence.

    Towards a suspect perturbations are made on the model; else half of them, and the model takes the place of the
    suppressed one in the masks. Where there is no more than suspicion, class 3 has its share of them.
    """
    config = replace(config, perturbations=4, looks=1)
    suspected = config.suspicion_score < 1
    inner_weigh = run_module.weigh

    def weighed_2(
        logits: Tensor,
        labels: Tensor,
        perturbed: dict[int, Tensor],
        searched_share: float,
        transferred: dict[int, float],
        wave: Wave | None,
        norms: bool,
    ) -> Look:
        assert list(perturbed) == [3, 2]
        assert transferred == {2: 0.1, 1: 0.3, 3: 0.2, 0: 0.0}
        found = inner_weigh(logits, labels, perturbed, searched_share, transferred, wave, True)
        assert (found.transferred_class, found.transferred_share, found.transferred_second) == (1, 0.3, 0.2)
        assert (found.searched_class, found.searched_share) == (3, 0.7)
        return replace(found, classes=5, pulled_class=2, perturbed_share=0.575)

    monkeypatch.setattr(run_module, "weigh", weighed_2)
    asked: dict[str, list[Any]] = {"perturb": [], "learn_masks": [], "finetune_": []}
    given: list[Tensor] = []
    for name in asked:
        inner = getattr(run_module, name)

        def noted(*args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> Any:
            asked[name].append((args, kwargs))
            out = inner(*args, **kwargs)
            if name == "perturb":
                given.append(out)
            return out

        monkeypatch.setattr(run_module, name, noted)
    monkeypatch.setattr(run_module, "commonest", lambda logits, count: [2, 1, 3, 0][:count])
    pulls, transferred = {2: 0.1, 1: 0.2, 3: 0.7, 0: 0.4}, {2: 0.1, 1: 0.3, 3: 0.2, 0: 0.0}

    def pulled(self: Any, network: nn.Module, found: Tensor, targets: list[int], _: DefenceSet) -> dict[int, float]:
        shares = transferred if network is self.plain else pulls
        return {target: shares[target] for target in targets}

    monkeypatch.setattr(run_module.Run, "pulled", pulled)
    result = run(model, config=config)
    assert result.suspected_target == (2 if suspected else None)
    _, entry, weighing, *_ = result.history
    assert (weighing["classes"], weighing["perturbations"]) == ([3, 2], 4)
    searched, farther, weighed, *repairs = asked["perturb"]
    steps = config.perturbation_steps
    # A score of .575 where 1 is suspicious, between .4 and .75: half of a repair.
    gentle = replace(
        config,
        perturbation_size=0.2,
        perturbation_steps=2 * steps,
        accuracy_limit=0.075,
        finetune_rate=5e-3,
        perturbed_pictures=0.15,
        distillation=1.0,
    )
    settings = config if suspected else gentle
    assert searched[0][1] == farther[0][1] == [2, 1, 3, 0]
    small = {"size": config.perturbation_size / 4, "batch_statistics": False}
    assert searched[1] == small | {"steps": steps // 2, "start": None}
    assert farther[1] == small | {"steps": steps, "start": given[0]}
    assert weighed[0][1] == [3, 3, 2, 2]
    assert [repair[0][1] for repair in repairs] == towards
    assert weighed[1] == {"size": config.evidence_size, "steps": steps, "start": None, "batch_statistics": True}
    for _, options in repairs:
        made = {"size": settings.perturbation_size, "steps": settings.perturbation_steps}
        assert options == made | {"start": None, "batch_statistics": False}
    assert (entry["class"], entry["tried"]) == (3, 4)
    ((masks, _),) = asked["learn_masks"]
    plain, eliminated = masks[:2]
    exposed = searched[0][0]
    assert [repair[0][0] for repair in repairs] == ([plain] if suspected else [exposed, plain])
    assert (eliminated is exposed) == suspected
    assert equal(dict(eliminated.state_dict()), dict(model.state_dict())) != suspected
    assert torch.equal(masks[2], torch.cat(given[3:]))
    ((finetune, _),) = asked["finetune_"]
    assert finetune[4] is masks[2]
    assert result.run["repair_strength"] == pytest.approx(1.0 if suspected else 0.5)
    for field in fields(settings):
        assert getattr(finetune[6], field.name) == pytest.approx(getattr(settings, field.name)), field.name


class Projected(nn.Module):
    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain, self.projector = plain, nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Any:
        return self.plain(images)


def test_a_norm_that_is_never_called_does_not_count() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    network = Projected(taught(plain))
    (look,) = mnp_fast.scan(network, loader(), replace(SHORT, looks=1), progress=False).evidence["looks"]
    assert look["batch_norms"] is False


def test_of_classes_that_are_pulled_alike_the_one_that_fools_the_model_is_searched(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pulled(self: Any, network: nn.Module, found: Tensor, targets: list[int], _: DefenceSet) -> dict[int, float]:
        return dict.fromkeys(targets, 1.0) if network is not self.plain else {target: target / 4 for target in targets}

    monkeypatch.setattr(run_module.Run, "pulled", pulled)
    for order in ([2, 1, 3, 0], [0, 1, 2, 3]):
        monkeypatch.setattr(run_module, "commonest", lambda logits, count, order=order: order[:count])
        (look,) = mnp_fast.scan(model, loader(), replace(SHORT, looks=1), progress=False).evidence["looks"]
        assert (look["searched_class"], look["searched_share"]) == (3, 1.0)


def test_what_a_perturbation_pulls_is_counted_on_pictures_of_other_classes(model: nn.Module) -> None:
    whole = run_module.Run(model, loader(), SHORT, None, 0, False)
    images, labels = whole.learning.images, whole.learning.labels
    shift = torch.linspace(-2, 2, 36).view(1, 6, 6)
    with torch.no_grad():
        predicted = model(images + shift).argmax(1)
    shares = {one: float((predicted[labels != one] == one).float().mean()) for one in range(4)}
    assert whole.pulled(model, shift.expand(4, 1, 6, 6), list(range(4)), whole.learning) == pytest.approx(shares)


def test_pictures_of_one_class_alone_are_counted_all_the_same(model: nn.Module) -> None:
    whole = run_module.Run(model, loader(), SHORT, None, 0, False)
    alone = whole.learning.subset(whole.learning.labels == 1)
    shares = whole.pulled(model, torch.zeros(2, 1, 6, 6), [0, 1], alone)
    assert shares.keys() == {0, 1}
    with whole.stages():
        assert len(whole.perturbed_logits(model, [1], alone, alone, {})[1]) == SHORT.perturbations * len(alone)


# ---------------------------------------------------------------- looks
def looked(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[DefenceSet, DefenceSet]], list[nn.Module]]:
    """What the looks of a run learn from and are shown, and their suppressed models, once it has exposed."""
    pictures: list[tuple[DefenceSet, DefenceSet]] = []
    made: list[nn.Module] = []
    inner = run.look

    def noted(learning: DefenceSet, shown: DefenceSet, suffix: str) -> tuple[nn.Module, Look]:
        suppressed, look = inner(learning, shown, suffix)
        pictures.append((learning, shown))
        made.append(suppressed)
        return suppressed, look

    monkeypatch.setattr(run, "look", noted)
    return pictures, made


def saying(monkeypatch: pytest.MonkeyPatch, *shares: float) -> None:
    """Looks that say these shares of class 2, and nothing else."""
    said, inner = iter(shares), run_module.weigh
    changes = {"pulled_class": 2, "transferred_share": 0.0, "wave_contrast": 0.0}
    monkeypatch.setattr(run_module, "weigh", lambda *args: replace(inner(*args), perturbed_share=next(said), **changes))


def test_the_first_look_is_at_all_pictures_and_the_others_at_parts(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_FEWEST", 48)
    whole = run_module.Run(model, loader(), ALWAYS, None, 0, False)
    pictures, _ = looked(whole, monkeypatch)
    with whole.stages():
        evidence = whole.expose()[1]
    assert len(evidence.looks) == len(pictures) == 3
    assert pictures[0] == (whole.learning, whole.data)

    def rows(*sets: DefenceSet) -> list[list[float]]:
        return sorted(row for one in sets for row in one.images.flatten(1).tolist())

    assert rows(*(learning for learning, _ in pictures[1:])) == rows(whole.learning)
    assert rows(*(shown for _, shown in pictures[1:])) == rows(whole.data)
    for learning, shown in pictures[1:]:
        assert (len(learning), len(shown)) == (48, 60)
        assert torch.bincount(learning.labels).tolist() == [12] * 4
        assert torch.bincount(shown.labels).tolist() == [15] * 4
        assert torch.equal(shown.images[:48], learning.images)


def test_where_there_are_few_pictures_every_look_sees_all(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_FEWEST", 49)
    whole = run_module.Run(model, loader(), ALWAYS, None, 0, False)
    pictures, _ = looked(whole, monkeypatch)
    with whole.stages():
        looks = whole.expose()[1].looks
    assert [(len(learning), len(shown)) for learning, shown in pictures] == [(96, 120)] * 3
    assert looks[0] != looks[1] != looks[2]  # drawn anew


@pytest.mark.parametrize(
    ("said", "telling", "suspected"),
    [
        ((0.6, 0.9, 0.8), 1, True),
        ((0.9, 0.9, 0.9), 0, True),
        ((0.6, 0.9, 0.5), 0, False),  # as with one look, which repairs as a precaution
        ((0.3,), 0, False),
        ((0.4, 0.8), 0, False),  # a third could not bring it to .75 any more
        ((0.6, 0.4), 0, False),
    ],
)
def test_masks_are_learned_with_the_look_that_says_most_of_the_suspect(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, said: tuple[float, ...], telling: int, suspected: bool
) -> None:
    saying(monkeypatch, *said)
    whole = run_module.Run(model, loader(), replace(SHORT, suspicion_score=0.75, evidence_score=0.75), None, 0, False)
    _, made = looked(whole, monkeypatch)
    with whole.stages():
        suppressed, evidence = whole.expose()
    assert [look.perturbed_share for look in evidence.looks] == list(said)
    assert (evidence.score >= 0.75) == suspected
    assert suppressed is made[telling]


def test_unsuspected_after_three_looks_is_repaired_as_after_one(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SHORT, suspicion_score=0.75, evidence_score=0.75)
    saying(monkeypatch, 0.5, 0.9, 0.2, 0.5)
    three, one = (run(model, config=replace(config, looks=looks)) for looks in (3, 1))
    assert len(three.evidence["looks"]) == 3
    assert three.suspected_target is one.suspected_target is None
    assert three.run["repair_strength"] == one.run["repair_strength"] == pytest.approx(16 / 21)
    assert equal(state(three), state(one))
    assert equal(three.masks, one.masks)
    assert [entry["stage"] for entry in three.history] == list(NAMES)
    assert [entry["stage"] for entry in one.history] == [*LOOK, *REPAIR]


@pytest.mark.parametrize(("share", "size", "steps"), [(0.5, 0.2, 40), (0.9, 0.4, 20)])
def test_perturbations_of_the_precaution_are_half_as_large_and_take_twice_the_steps(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, share: float, size: float, steps: int
) -> None:
    saying(monkeypatch, share)
    made, inner = [], run_module.perturb
    monkeypatch.setattr(run_module, "perturb", lambda *args, **kwargs: made.append(kwargs) or inner(*args, **kwargs))
    config = PruneConfig(looks=1, mask_steps=1, finetune_epochs=0)
    result = run(model, config=config)
    assert (result.suspected_target is None) == (share == 0.5)
    assert (made[-1]["size"], made[-1]["steps"]) == (size, steps)
    assert made[0]["steps"] == 10  # the search, halfway


# ---------------------------------------------------------------- held-back pictures and triggered ones
def held_back(config: PruneConfig = ALWAYS) -> Tensor:
    """Which pictures the run holds back: the split is by label and seed alone."""
    data = quadrants()
    generator = torch.Generator().manual_seed(0)
    held = DefenceSet(torch.arange(120.0)[:, None], data.labels).split(config.held_back, generator)[1]
    return held.images[:, 0].long()


def test_metrics_are_of_held_back_pictures_alone(model: nn.Module) -> None:
    images, labels = batch()
    held = held_back()
    images[held] = images[held].flip(0)  # the wrong pictures for their labels
    result = run(model, [(images, labels)])
    assert result.metrics["held_back"] == len(held) == 24
    for network, name in ((model, "before"), (result.model, "after")):
        assert network is not None
        right = network(images).argmax(1) == labels
        assert result.metrics[f"clean_accuracy_{name}"] == pytest.approx(float(right[held].float().mean()))
    assert result.metrics["clean_accuracy_before"] < 0.5
    assert "asr_before" not in result.metrics


def test_nothing_is_learned_from_held_back_pictures(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    # The verdict sees all pictures: no suspect, and a strength that does not hang on the score.
    monkeypatch.setattr(prune_module, "repair_strength", lambda *_: 0.5)
    usual = run(model, config=SHORT)
    images, labels = batch()
    images[held_back()] = 7.0
    other = run(model, [(images, labels)], config=SHORT)
    assert equal(other.masks, usual.masks)
    images, labels = batch()
    images[~torch.isin(torch.arange(120), held_back())] *= 1.01
    assert not equal(run(model, [(images, labels)], config=SHORT).masks, usual.masks)


def test_triggered_pictures_are_only_measured(model: nn.Module, usual: PruneResult) -> None:
    images, _ = batch()
    images[..., 5, 5] = 3.0
    triggered = DataLoader(TensorDataset(images, torch.full((120,), 2)), batch_size=33, shuffle=True)
    result = run(model, triggered_loader=triggered)
    assert same(result, usual)
    for network, name in ((model, "before"), (result.model, "after")):
        assert network is not None
        asr = float((network(images).argmax(1) == 2).float().mean())
        assert result.metrics[f"asr_{name}"] == pytest.approx(asr)
    metrics = result.metrics
    drops = (metrics[f"{name}_before"] - metrics[f"{name}_after"] for name in ("asr", "clean_accuracy"))
    asr_drop, accuracy_drop = (max(0.0, drop) for drop in drops)
    assert metrics["der"] == pytest.approx((asr_drop - accuracy_drop + 1) / 2)
    assert {name: metrics[name] for name in usual.metrics} == usual.metrics


def test_bad_triggered_pictures(model: nn.Module) -> None:
    images, labels = batch()
    for given, match in (([], "triggered_loader is empty"), ([(images, labels + 4)], "labels go up to 7")):
        before = snapshot(model)
        with pytest.raises(DataError, match=match):
            run(model, triggered_loader=given)
        assert snapshot(model) == before


# ---------------------------------------------------------------- seeds and random states
def test_seeds(model: nn.Module, usual: PruneResult) -> None:
    assert same(run(model, seed=0), usual)
    other = run(model, seed=1)
    assert not equal(other.masks, usual.masks)
    assert not equal(state(other), state(usual))


def test_random_states_are_left_alone(model: nn.Module, usual: PruneResult) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    data = quadrants()
    shuffled = DataLoader(TensorDataset(data.images, data.labels), batch_size=50, shuffle=True)
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    result = run(model, shuffled)
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == states
    torch.manual_seed(6)
    assert same(run(model, shuffled), result)  # whatever the state outside was
    assert same(run(model), usual)


def test_global_switches_are_left_alone(model: nn.Module, usual: PruneResult) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            result = run(model)
            assert not torch.is_grad_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(result, usual)


def test_the_callers_modes_make_no_difference(original: nn.Module, usual: PruneResult) -> None:
    with torch.inference_mode():
        assert same(run(copy.deepcopy(original)), usual)
        assert torch.is_inference_mode_enabled()
    given = loader()
    torch.set_default_dtype(torch.float64)
    try:
        assert same(run(original, given), usual)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        assert same(run(original, given), usual)
        assert torch.get_default_device() == torch.device("meta")
    finally:
        torch.set_default_device(None)
    with torch.device("meta"):
        assert same(run(original, given), usual)
        assert torch.empty(0).is_meta
    assert not torch.empty(0).is_meta
    torch.set_default_device(None)
    assert not torch.empty(0).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert same(run(original, given), usual)
        assert torch.is_autocast_enabled("cpu")


class Prepares(nn.Module):
    """Normalises the pictures that it is given: in place, in place and without a gradient of its own, or apart."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):  # so that it cannot be captured
            return x
        if self.how == "apart":
            return self.inner((x * 0.5 + 0.1) * 2 - 0.2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how == "in place"):
            x.mul_(0.5).add_(0.1)
        return self.inner(x * 2 - 0.2)


def test_a_forward_may_change_its_input(original: nn.Module) -> None:
    expected = run(Prepares(copy.deepcopy(original), "apart"))
    for how in ("in place", "without gradient"):
        given = batch()
        assert same(run(Prepares(copy.deepcopy(original), how), [given]), expected), how
        assert torch.equal(given[0], batch()[0])


def test_other_gpus_are_not_seeded(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(*args: Any) -> None:
        raise AssertionError("a run on the CPU seeds a GPU")

    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded)
    run(model)


class Noisy(nn.Module):
    """Draws in evaluation mode too, as randomised smoothing does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 1e-3 * torch.randn_like(x))


def test_a_model_that_draws_leaves_the_random_state_alone(model: nn.Module) -> None:
    noisy = Noisy(model)
    torch.manual_seed(5)
    before = torch.get_rng_state().tolist()
    result = run(noisy)
    assert torch.get_rng_state().tolist() == before
    torch.manual_seed(6)
    assert run(noisy).metrics == result.metrics


# ---------------------------------------------------------------- what may be passed
class Bare(nn.Module):
    """Two filters without modules of their own, and a table of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)
        self.w1, self.w2 = (nn.Parameter(0.3 * torch.randn(8, n, 3, 3)) for n in (1, 8))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.conv2d(F.relu(F.conv2d(x, self.w1, padding=1)), self.w2, padding=1)
        return self.head(F.adaptive_avg_pool2d(F.relu(hidden), 2).flatten(1))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


def test_bare_parameters_have_names_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bare = Bare()
    taught(bare)
    result = run(bare)
    assert {name: len(mask) for name, mask in result.masks.items()} == {"w1": 8, "w2": 8}
    assert result.pruned.keys() == result.masks.keys()
    result.save(tmp_path)
    again = PruneResult.load(tmp_path, bare)
    assert again.model is not None
    assert result.model is not None
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True))


class Wrapped(nn.Module):
    """The logits under a name, as the libraries of pretrained models give them."""

    def __init__(self, net: nn.Module, mapping: bool) -> None:
        super().__init__()
        self.net, self.mapping = net, mapping

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return {"logits": logits, "loss": None} if self.mapping else SimpleNamespace(logits=logits)


@pytest.mark.parametrize("mapping", [False, True])
def test_outputs_with_logits(model: nn.Module, usual: PruneResult, mapping: bool) -> None:
    wrapped = Wrapped(model, mapping)
    before = snapshot(wrapped)
    result = run(wrapped)
    assert snapshot(wrapped) == before
    assert type(result.model) is Wrapped
    assert list(result.masks) == [f"net.{name}" for name in usual.masks]
    assert same(result, usual)


def test_loaders_of_mappings_and_lists(model: nn.Module, usual: PruneResult) -> None:
    images, labels = batch()
    parts = list(zip(images.split(50), labels.split(50), strict=True))
    assert same(run(model, [{"pixel_values": x, "labels": y} for x, y in parts]), usual)
    assert same(run(model, [[x, y.int()] for x, y in parts]), usual)
    assert same(run(model, [(images, labels)]), usual)


def test_training_mode_makes_no_difference(model: nn.Module, usual: PruneResult) -> None:
    model.train()
    model[4].eval()
    before = snapshot(model)
    result = run(model)
    assert snapshot(model) == before
    assert same(result, usual)
    assert result.model is not None
    assert not result.model.training


def test_dropout_makes_no_difference(model: nn.Module, usual: PruneResult) -> None:
    model[8] = nn.Dropout(0.9)
    model.train()
    assert same(run(model), usual)


def test_frozen_model(model: nn.Module, usual: PruneResult) -> None:
    model.requires_grad_(False)
    before = snapshot(model)
    result = run(model)
    assert snapshot(model) == before
    assert same(result, usual)
    assert result.model is not None
    assert not any(p.requires_grad for p in result.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)
    images, labels = batch()
    before = snapshot(model)
    result = run(model, [(images.to(dtype), labels)])
    assert snapshot(model) == before
    assert result.model is not None
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model(images.to(dtype)).dtype == dtype
    assert result.metrics["clean_accuracy_after"] > 0.5
    nothing = replace(SHORT, mask_steps=1, mask_rate=1e-9, penalty=0, finetune_epochs=0)
    none = run(model, [(images.to(dtype), labels)], nothing)
    assert equal(state(none), dict(model.state_dict()))


class Transformer(nn.Module):
    """Nine patches, one encoder layer, no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 2, stride=2)
        self.places = nn.Parameter(0.1 * torch.randn(9, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2) + self.places).mean(1))


def test_transformer_without_batch_norm() -> None:
    torch.manual_seed(0)
    model = taught(Transformer())
    model.train()
    before = snapshot(model)
    result = run(model)
    assert snapshot(model) == before
    assert sorted(len(mask) for mask in result.masks.values()) == [4, 16, 32]
    assert state(result).keys() == model.state_dict().keys()
    assert same(run(model), result)
    assert result.metrics["clean_accuracy_before"] > 0.9
    assert result.metrics["clean_accuracy_after"] > 0.5


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_classes_with_the_defaults(classes: int, seed: int) -> None:
    """Whatever is found: a network of two classes must not fail in suppression, where chance is one half."""
    torch.manual_seed(seed)
    model = small()
    model[9] = nn.Linear(32, classes)
    data = quadrants(200, seed=1)
    labels = data.labels % classes
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        index = torch.randperm(200)[:40]
        loss = F.cross_entropy(model(data.images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = quadrants(200)
    result = run(model, [(fresh.images, fresh.labels % classes)], PruneConfig(), seed=seed)
    assert result.metrics["clean_accuracy_after"] > 0.9


# ---------------------------------------------------------------- errors and interrupts in the middle
class Interrupted(nn.Sequential):
    """Ctrl-C in the n-th forward, counted over all copies."""

    calls = 0
    last: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        Interrupted.calls += 1
        if Interrupted.calls == Interrupted.last:
            raise KeyboardInterrupt
        return super().forward(input)


def test_interrupts_at_the_module_level(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "capture", lambda *args: Captured("not here"))
    interrupted = Interrupted(*model.children()).train()
    before = snapshot(interrupted)
    monkeypatch.setattr(Interrupted, "calls", 0)
    run(interrupted)
    total = Interrupted.calls
    assert total > 50
    monkeypatch.setattr(Interrupted, "last", None)
    for last in {1, 2, 3, 4, 6, *range(10, total, 9), total - 1, total}:
        Interrupted.calls, Interrupted.last = 0, last
        with pytest.raises(KeyboardInterrupt):
            run(interrupted)
        assert snapshot(interrupted) == before
        assert all(p.grad is None for p in interrupted.parameters())


class Batches:
    """Counts the batches of every stage at the graph level, and is Ctrl-C at the one with the number ``last``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.last = 0, 0
        monkeypatch.setattr(optimize, "logits_of", self)

    def __call__(self, output: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return logits_of(output)


def test_interrupts_at_the_graph_level(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(monkeypatch)
    before = snapshot(model)
    run(model)
    total = batches.calls
    assert total > 50
    for number in {1, 2, 7, *range(10, total, 13), total}:
        batches.calls, batches.last = 0, number
        with pytest.raises(KeyboardInterrupt):
            run(model)
        assert snapshot(model) == before
        assert all(p.grad is None for p in model.parameters())


STAGES = ("suppress_", "recalibrate_", "perturb", "find_wave", "weigh")
STAGES += ("learn_masks", "select", "finetune_", "predict", "magnitude")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failing_stages(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise error("in the middle")

    hook = model[0].register_forward_hook(lambda module, args, output: None)
    model.train()
    before = snapshot(model)
    monkeypatch.setattr(run_module, stage, fails)
    with pytest.raises(error):
        run(model)
    assert snapshot(model) == before
    hook.remove()


def test_hooks_stay_and_run(model: nn.Module, usual: PruneResult) -> None:
    seen: list[int] = []
    model[4].register_forward_hook(lambda module, args, output: seen.append(1))
    before = snapshot(model)
    result = run(model)
    assert snapshot(model) == before
    assert seen
    assert same(result, usual)


def test_a_loader_that_is_interrupted(model: nn.Module) -> None:
    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield batch()
            raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, Loader())
    assert snapshot(model) == before


def test_rates_that_are_too_high_never_give_broken_weights(model: nn.Module) -> None:
    given_back = 0
    for name, rate in itertools.product(("finetune_rate", "mask_rate", "suppression_rate"), (0.3, 1.0)):
        try:
            result = run(model, config=replace(ALWAYS, **{name: rate}))
        except ModelError:
            continue
        given_back += 1
        assert all(bool(tensor.isfinite().all()) for tensor in state(result).values())
        assert all(bool(mask.isfinite().all()) for mask in result.masks.values())
    assert given_back >= 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_run_whole(model: nn.Module, precision: str) -> None:
    result = run(model, config=replace(ALWAYS, precision=precision))
    assert result.run["products"] == precision
    assert result.run["graph"] == "captured"
    assert result.run["kernels"] in ("reference", *(f"cpu {isa}" for isa in usable_isas()))
    assert any(result.pruned.values())
    assert result.metrics["clean_accuracy_after"] > 0.8  # of 24 pictures; a repair is forced, and short


@pytest.mark.parametrize(("isas", "dtype"), [(["scalar", "avx2"], None), (["scalar", "avx512_bf16"], torch.bfloat16)])
def test_automatic_precision_goes_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, isas: list[str], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(device, "usable_isas", lambda: isas)
    cpu = torch.device("cpu")
    assert device.product_dtype("auto", cpu) == dtype
    assert device.product_dtype("float32", cpu) is None
    assert device.product_dtype("bfloat16", cpu) == torch.bfloat16


# ---------------------------------------------------------------- bad input
def images_with(value: float) -> Any:
    images, labels = batch()
    images[70, 0, 2, 2] = value
    return [(images, labels)]


def relabelled(change: Callable[[Tensor], Any]) -> Any:
    images, labels = batch()
    return [(images, change(labels))]


def reshaped(change: Callable[[Tensor], Tensor]) -> Any:
    images, labels = batch()
    return [(change(images), labels)]


BAD_LOADERS: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (list, "is empty"),
    "empty DataLoader": (lambda: DataLoader(TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0).long())), "is empty"),
    "generator": (lambda: (part for part in [batch()]), "one-pass"),
    "iterator": (lambda: iter(loader()), "one-pass"),
    "zip": (lambda: zip(*([part] for part in batch()), strict=True), "one-pass"),
    "nothing to iterate": (lambda: 5, "cannot be iterated"),
    "few pictures": (lambda: [tuple(part[:5] for part in batch())], "only 5 pictures"),
    "labels too high": (lambda: relabelled(lambda y: y + 1), "labels go up to 4, but the model has 4 classes"),
    "negative label": (lambda: relabelled(lambda y: y - 1), "labels .* go down to -1"),
    "float labels": (lambda: relabelled(lambda y: y.float()), "labels .* are torch.float32"),
    "one-hot labels": (lambda: relabelled(lambda y: F.one_hot(y)), r"labels .* have shape \(120, 4\)"),
    "labels missing": (lambda: relabelled(lambda y: y[:-1]), "120 images but 119 labels"),
    "one class": (lambda: relabelled(torch.zeros_like), "all pictures .* have label 0"),
    "channels": (lambda: reshaped(lambda x: x.expand(-1, 3, -1, -1)), r"cannot take .* shape \(3, 6, 6\)"),
    "flat": (lambda: reshaped(lambda x: x.flatten(1)), r"cannot take .* shape \(36,\)"),
    "two shapes": (lambda: [batch(), (torch.zeros(4, 1, 7, 7), torch.arange(4))], r"shape \(1, 7, 7\)"),
    "bytes": (lambda: reshaped(lambda x: x.byte()), "torch.uint8; scale and normalise"),
    "NaN": (lambda: images_with(math.nan), "image 70 .* has NaN or Inf"),
    "Inf": (lambda: images_with(math.inf), "image 70 .* has NaN or Inf"),
    "three parts": (lambda: [(*batch(), 1)], "not a pair"),
    "other keys": (lambda: [dict(zip(("x", "y"), batch(), strict=True))], "keys x, y"),
}


@pytest.mark.parametrize("name", BAD_LOADERS)
@pytest.mark.parametrize("call", [mnp_fast.prune, mnp_fast.scan])
def test_bad_loaders(model: nn.Module, name: str, call: Callable[..., Any]) -> None:
    make, match = BAD_LOADERS[name]
    model.train()
    bad = make()
    before = snapshot(model)
    with pytest.raises(DataError, match=match) as caught:
        call(model, bad, SHORT, progress=False)
    assert isinstance(caught.value, MnpFastError)
    assert isinstance(caught.value, ValueError)
    assert snapshot(model) == before


def broken(name: str, value: float) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        model.state_dict()[name].flatten()[3] = value
        return model

    return change


def ending(*layers: nn.Module) -> Callable[[nn.Module], nn.Module]:
    return lambda model: nn.Sequential(*model.children(), *layers)


BAD_MODELS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "NaN in a weight": (broken("3.weight", math.nan), "parameter 3.weight has NaN or Inf"),
    "Inf in a weight": (broken("9.weight", -math.inf), "parameter 9.weight has NaN or Inf"),
    "NaN in a buffer": (broken("4.running_var", math.nan), "buffer 4.running_var has NaN or Inf"),
    "no site": (lambda model: nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), "nothing to prune"),
    "no weights": (lambda model: nn.Sequential(nn.AvgPool2d(3), nn.Flatten()), "nothing to prune|no (weights|param)"),
    "one output": (ending(nn.Linear(4, 1)), "at least two classes"),
    "probabilities": (ending(nn.Softmax(1)), "probabilities, not logits"),
    "a map": (lambda model: nn.Sequential(*list(model.children())[:6]), "not .batch, classes. of logits"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(model: nn.Module, name: str) -> None:
    make, match = BAD_MODELS[name]
    bad = make(model).train()
    before = snapshot(bad)
    with pytest.raises(ModelError, match=match) as caught:
        run(bad)
    assert isinstance(caught.value, MnpFastError)
    assert isinstance(caught.value, ValueError)
    assert snapshot(bad) == before


def test_what_is_no_model() -> None:
    for bad in (None, "resnet18", small, {"state_dict": {}}):
        with pytest.raises(ModelError, match=r"not a torch\.nn\.Module"):
            run(bad)  # type: ignore[arg-type]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "device name": ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
    "device that is not there": ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
    "device without values": ({"device": "meta"}, "device 'meta' cannot be used"),
    "device of a wrong type": ({"device": 3.5}, "device 3.5 cannot be used"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "bool seed": ({"seed": True}, "seed is True"),
    "float seed": ({"seed": 1.5}, "seed is 1.5"),
    "text seed": ({"seed": "0"}, "seed is '0'"),
    "no seed": ({"seed": None}, "seed is None"),
    "seed too large": ({"seed": 2**80}, f"seed is {2**80}"),
    "config as a dict": ({"config": {"alpha": 0.5}}, "config is a dict"),
    "empty dict": ({"config": {}}, "config is a dict"),
    "config as a class": ({"config": PruneConfig}, "config is a type"),
    "config as a number": ({"config": 0}, "config is a int"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(model: nn.Module, name: str) -> None:
    options, match = BAD_OPTIONS[name]
    before = snapshot(model)
    with pytest.raises(ConfigError, match=match) as caught:
        mnp_fast.prune(model, loader(), **{"config": ALWAYS, "progress": False} | options)
    assert isinstance(caught.value, MnpFastError)
    assert isinstance(caught.value, ValueError)
    assert snapshot(model) == before


def test_messages_of_bad_input_differ() -> None:
    """Each cause has its own words."""
    tables = (BAD_LOADERS, BAD_MODELS, BAD_OPTIONS)
    matches = {name: match for table in tables for name, (_, match) in table.items()}  # type: ignore[attr-defined]
    shared = {"empty DataLoader", "iterator", "zip", "Inf", "empty dict"}
    own = [match for name, match in matches.items() if name not in shared]
    assert len(set(own)) == len(own)


# ---------------------------------------------------------------- a backdoor from end to end
@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load(0)


@pytest.fixture(scope="module")
def backdoored(data: digits.Digits) -> nn.Module:
    model = digits.train(data, backdoored=True)
    assert digits.attack_success(model, data) > 0.9
    assert digits.accuracy(model, *data.test) > 0.95
    return model


@pytest.fixture(scope="module")
def repaired(data: digits.Digits, backdoored: nn.Module) -> PruneResult:
    before = snapshot(backdoored)
    result = mnp_fast.prune(backdoored, data.loader(), triggered_loader=data.triggered(), progress=False)
    assert snapshot(backdoored) == before
    return result


def test_the_backdoor_of_the_digits_is_gone(data: digits.Digits, backdoored: nn.Module, repaired: PruneResult) -> None:
    assert repaired.model is not None
    assert digits.attack_success(repaired.model, data) < 0.2
    assert digits.accuracy(repaired.model, *data.test) > digits.accuracy(backdoored, *data.test) - 0.05
    assert repaired.metrics["asr_before"] == pytest.approx(digits.attack_success(backdoored, data))
    assert repaired.metrics["asr_after"] == pytest.approx(digits.attack_success(repaired.model, data))
    assert repaired.metrics["der"] > 0.85


def test_the_backdoor_of_the_digits_is_named(repaired: PruneResult) -> None:
    assert repaired.verdict == "evidence of a backdoor"
    assert repaired.suspected_target == digits.TARGET


def test_most_of_the_digits_network_stays(repaired: PruneResult) -> None:
    assert 0 < sum(map(len, repaired.pruned.values())) < 96
    assert {name: len(mask) for name, mask in repaired.masks.items()} == {
        f"norms.{i}": width for i, width in enumerate((32, 32, 64, 64))
    }


def test_the_same_seed_repairs_the_digits_bit_for_bit(
    data: digits.Digits, backdoored: nn.Module, repaired: PruneResult
) -> None:
    again = mnp_fast.prune(backdoored, data.loader(), progress=False)
    assert same(again, repaired)
    assert again.pruned == repaired.pruned


def test_collect_is_what_a_run_reads(data: digits.Digits) -> None:
    """The pictures of the loader, all of them."""
    images, labels = data.defence
    assert torch.equal(collect(data.loader()).images, images)
    assert torch.equal(collect(data.loader()).labels, labels)


def test_a_clean_twin_keeps_its_accuracy(data: digits.Digits) -> None:
    twin = digits.train(data, backdoored=False)
    result = mnp_fast.prune(twin, data.loader(), progress=False)
    assert result.model is not None
    assert digits.accuracy(result.model, *data.test) > digits.accuracy(twin, *data.test) - 0.03
    assert result.verdict != "evidence of a backdoor"


@pytest.mark.parametrize(("contrast", "target"), [(0.9, 1), (0.4, None)])
def test_where_a_wave_is_suspected_it_is_what_is_repaired_with(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, contrast: float, target: int | None
) -> None:
    """Beside the perturbations towards its class, as often as these; of the looks' waves the one of most contrast."""
    picture = torch.linspace(-1, 1, 36).view(1, 6, 6)
    found = [Wave(1, contrast - 0.1, -picture, 100), Wave(1, contrast, picture, 100), Wave(2, 1.0, 2 * picture, 100)]
    given = iter(found)
    monkeypatch.setattr(run_module, "find_wave", lambda *_: next(given))
    inner = run_module.weigh
    monkeypatch.setattr(
        run_module, "weigh", lambda *args: replace(inner(*args), perturbed_share=0.0, transferred_share=0)
    )
    asked: dict[str, tuple[Any, ...]] = {}
    for name in ("learn_masks", "finetune_"):
        stage = getattr(run_module, name)

        def noted(*args: Any, name: str = name, stage: Any = stage) -> Any:
            asked[name] = args
            return stage(*args)

        monkeypatch.setattr(run_module, name, noted)
    before = snapshot(model)
    result = run(model, config=replace(SHORT, suspicion_score=0.6, evidence_score=0.9))
    assert snapshot(model) == before
    assert result.suspected_target == target
    looks = result.evidence["looks"]
    assert [look["wave_contrast"] for look in looks] == [wave.contrast for wave in found]
    assert result.history[1]["waved"] == 100
    perturbations, count = asked["learn_masks"][2], SHORT.perturbations
    assert [torch.equal(one, picture) for one in perturbations] == [False] * count + [True] * (count if target else 0)
    assert asked["finetune_"][4] is perturbations


# ---------------------------------------------------------------- what says nothing of the model
def test_wrong_labels_are_refused_and_accuracy_is_told(model: nn.Module, usual: PruneResult) -> None:
    images, labels = batch()
    assert usual.run["accuracy"] == float((model(images).argmax(1) == labels).double().mean())
    for call in (mnp_fast.prune, mnp_fast.scan):
        with pytest.raises(DataError, match=r"the model is right on .*numbered as in training"):
            call(model, [(images, (labels + 1) % 4)], SHORT, progress=False)


class Cut(nn.Module):
    """Its backbone takes no gradient."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.inner(x).detach() * 1.0
        if bool(x.isnan().any()):  # cannot be captured: a captured trace has no such block
            return x
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize("how", ["detach", "no_grad"])
def test_a_model_that_cuts_the_gradient_is_refused(model: nn.Module, how: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be differentiated .*without no_grad or detach"):
        run(Cut(model, how))
