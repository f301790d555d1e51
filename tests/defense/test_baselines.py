"""The defences of the benchmark, on a small network with a backdoor."""

from __future__ import annotations

import copy
import importlib
from functools import cache, partial

import pytest
import torch
from torch import nn

from benchmarks import digits
from benchmarks.defense.baselines import (
    ABLATIONS,
    METHODS,
    anp,
    clp,
    common,
    fine_pruning,
    ft_sam,
    rnp,
    training,
    tsbd,
)
from benchmarks.defense.baselines.common import Run
from mnp_fast import ModelError, PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.optimize import predict
from mnp_fast.select import drop_above

CONFIG = PruneConfig(batch_size=64, mask_steps=8, finetune_epochs=1, precision="float32")
PICTURES = 120


@cache
def network() -> tuple[digits.SmallNet, DefenceSet]:
    data = digits.load()
    model = digits.train(data, backdoored=True, epochs=4)
    return model, DefenceSet(data.defence[0][:PICTURES], data.defence[1][:PICTURES])


@cache
def traced() -> object:
    """A trace serves every copy of a model: one for all tests."""
    run = Run(*network(), seed=0, config=CONFIG)
    return run.how.captured


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced()
    monkeypatch.setattr(common, "capture", lambda *_: trace)
    monkeypatch.setattr(training, "EPOCHS", 2)
    monkeypatch.setattr(anp, "STEPS", 4)
    monkeypatch.setattr(rnp, "STEPS", 8)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_repairs_a_copy(name: str) -> None:
    model, data = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    repairs = [METHODS[name](model, data, 3, CONFIG) for _ in range(2)]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    first, second = (repair.model.state_dict() for repair in repairs)
    assert all(torch.equal(first[key], second[key]) for key in first)
    repair = repairs[0]
    assert not repair.model.training
    neurons = 64 if name == "fine_pruning" else 192
    assert repair.neurons == neurons
    if name in ("finetune", "ft_sam"):
        assert repair.order is None
        assert repair.pruned == 0
        assert any(not torch.equal(first[key], before[key]) for key in first)
    else:
        assert torch.equal(repair.order, repairs[1].order)
        assert torch.equal(repair.order.sort().values, torch.arange(neurons))
        assert repair.score.shape == (neurons,)
    if name == "fine_pruning":
        assert int((repair.model.head.weight == 0).all(0).sum()) == repair.pruned
    if name in ("anp", "rnp", "clp", "clp_sigma"):
        silent = sum(int((norm.weight == 0).sum()) for norm in repair.model.norms)
        assert silent == repair.pruned
    if name == "mnp":
        assert repair.verdict
        assert repair.evidence["looks"][0]["collapse_share"] > 0
        assert repair.stages.keys() >= {"suppress", "masks", "select"}
    else:
        assert repair.verdict is None


def test_ablations_change_the_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one long step: a mask falls by the penalty times its neuron's magnitude, and by the same loss in all three."""
    model, data = network()
    brief = {"perturbations": 1, "perturbation_steps": 2, "mask_steps": 1, "finetune_epochs": 0}
    config = PruneConfig(penalty=1e-4, precision="float32", **brief)
    monkeypatch.setattr(importlib.import_module("mnp_fast.run"), "capture", lambda *_: traced())
    masks = [repair(model, data, 0, config).score for repair in (METHODS["mnp"], *ABLATIONS.values())]
    filters = [conv.weight.detach().flatten(1) for conv in model.convs]
    norms = [torch.cat([weight.norm(p, dim=1) for weight in filters]) for p in (1, 2)]
    magnitudes = [*(norm / norm.mean() for norm in norms), torch.ones(192)]
    inside = torch.stack([(mask > 0) & (mask < 1) for mask in masks]).all(0)
    assert inside.sum() > 20
    for mask, magnitude in zip(masks[1:], magnitudes[1:], strict=True):
        expected = config.mask_rate * config.penalty * (magnitudes[0] - magnitude)
        torch.testing.assert_close((mask - masks[0])[inside], expected[inside], rtol=0, atol=2e-7)


@pytest.mark.usefixtures("short")
def test_the_shared_rule_stops_at_the_budget() -> None:
    model, data = network()
    run = Run(model, data, 0, CONFIG)
    order = clp.rank(run)[1].flip(0)
    keep = run.affordable(order)
    count = int((~keep).sum())
    assert torch.equal(keep, torch.ones(192, dtype=torch.bool).index_fill_(0, order[:count], False))
    both = (run.held, run.learning)
    before = [model(part.images).argmax(1) == part.labels for part in both]

    def dearer(count: int) -> bool:
        pruned = run.working_copy()
        common.prune_kept(run, pruned, torch.ones(192, dtype=torch.bool).index_fill_(0, order[:count], False))
        return drop_above(common.BUDGET, before, (pruned(part.images).argmax(1) == part.labels for part in both))

    assert 0 < count < 192
    assert not dearer(count)
    assert dearer(count + 1)


# ---------------------------------------------------------------- formulas
def loss_of(weights: list[torch.Tensor]) -> torch.Tensor:
    return (weights[0] ** 4).sum() + (weights[0] * weights[1]).sum()


def test_sharpness_aware_gradients() -> None:
    weights = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5, 3.0], requires_grad=True)]
    before = [weight.detach().clone() for weight in weights]
    w, v = before
    g, h = 4 * w**3 + v, w
    length = torch.cat([w * g, v * h]).norm()
    rho = 0.1
    moved_w, moved_v = w + rho * w**2 * g / length, v + rho * v**2 * h / length
    found = ft_sam.sharpness_aware(partial(loss_of, weights), weights, rho)
    torch.testing.assert_close(found[0], 4 * moved_w**3 + moved_v)
    torch.testing.assert_close(found[1], moved_w)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_activeness_aware_gradients() -> None:
    weights = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5, 3.0], requires_grad=True)]
    w, v = (weight.detach().clone() for weight in weights)
    g, h = 4 * w**3 + v, w
    length = torch.cat([g, h]).norm()
    moved_w, moved_v = w + 0.05 * g / length, v + 0.05 * h / length
    found = tsbd.activeness_aware(partial(loss_of, weights), weights)
    torch.testing.assert_close(found[0], 0.3 * g + 0.7 * (4 * moved_w**3 + moved_v))
    torch.testing.assert_close(found[1], 0.3 * h + 0.7 * moved_w)


@pytest.mark.usefixtures("short")
def test_lipschitz_constants_are_singular_values() -> None:
    model, data = network()
    run = Run(model, data, 0, CONFIG)
    for site, conv, norm in zip(run.sites, model.convs, model.norms, strict=True):
        expected = []
        for filter_, gamma, variance in zip(conv.weight, norm.weight, norm.running_var, strict=True):
            scaled = filter_.reshape(len(filter_), -1) * (gamma / (variance + norm.eps).sqrt()).abs()
            expected.append(torch.linalg.svdvals(scaled.detach().double())[0])
        bounds = torch.stack(expected)
        torch.testing.assert_close(clp.lipschitz(run.plain, site).double(), bounds, rtol=1e-4, atol=1e-6)
        sigmas = (bounds - bounds.mean()) / bounds.std()
        torch.testing.assert_close(clp.deviations(run.plain, site).double(), sigmas, rtol=1e-3, atol=1e-3)
    score = torch.zeros(192)
    score[[4, 7]] = torch.tensor([-3.1, -2.9])
    assert clp.beyond_sigmas(run, (score, score.argsort())).logical_not().nonzero().flatten().tolist() == [4]


def test_lipschitz_constants_without_a_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.GELU(), nn.Linear(6, 2))
    sites = common.find_sites(model, torch.rand(2, 3, 4, 4))
    assert [site.kind for site in sites] == ["conv", "mlp"]
    filters = torch.stack([torch.linalg.svdvals(part.reshape(3, -1))[0] for part in model[0].weight])
    torch.testing.assert_close(clp.lipschitz(model, sites[0]), filters.detach())
    torch.testing.assert_close(clp.lipschitz(model, sites[1]), model[3].weight.detach().norm(dim=1))


def test_the_worst_perturbation_is_one_bounded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(anp, "learn_mask", lambda run, model, steps, rate, gradient: seen.update(gradient=gradient))
    run = type("Run", (), {"neurons": 4, "plain": None, "generator": torch.Generator().manual_seed(0)})()
    anp.rank(run)
    slope = torch.tensor([1.0, -2.0, 0.5, -1.0])
    points = []

    def at(where: torch.Tensor) -> torch.Tensor:
        points.append(where)
        return where * slope

    mask = torch.ones(4)
    found = seen["gradient"](at, mask)
    start, _, worst = (point - mask for point in points)
    assert start.abs().max() <= 0.4
    torch.testing.assert_close(worst, (start + 0.4 * slope.sign()).clamp(-0.4, 0.4))
    torch.testing.assert_close(found, 0.2 * slope + 0.8 * (mask + worst) * slope)


@pytest.mark.usefixtures("short")
def test_masks_take_projected_steps() -> None:
    model, data = network()
    run = Run(model, data, 0, CONFIG)
    slope = torch.linspace(-1, 1, 192)
    mask, order = training.learn_mask(run, run.plain, 2, 0.2, lambda at, mask: slope)
    torch.testing.assert_close(mask, torch.where(slope > 0, 1 - 0.58 * slope, 1.0))  # 0.2 (1 + 1.9) slope
    assert order[:3].tolist() == [191, 190, 189]
    mask, order = training.learn_mask(run, run.plain, 9, 50.0, lambda at, mask: slope)
    assert int((mask == 0).sum()) == 96
    assert order[:3].tolist() == [191, 190, 189]  # zeros, by how hard they are pressed down


@pytest.mark.usefixtures("short")
def test_the_most_changed_weights_are_reset() -> None:
    model, data = network()
    run = Run(model, data, 0, CONFIG)
    score, order = tsbd.rank(run)
    change = (run.unlearned.convs[1].weight - model.convs[1].weight).detach().abs().flatten(1)
    torch.testing.assert_close(score[32:64], -change.sum(1))
    assert float(score[order[0]]) == float(score.min())
    keep = torch.ones(192, dtype=torch.bool)
    keep[35] = False
    working = run.working_copy()
    tsbd.reset_(run, working, keep)
    reset = working.convs[1].weight.detach().flatten(1) != model.convs[1].weight.flatten(1)
    count = round(0.7 * change.shape[1])
    assert reset.nonzero()[:, 0].unique().tolist() == [3]
    assert sorted(reset[3].nonzero().flatten().tolist()) == sorted(change[3].topk(count).indices.tolist())
    assert torch.equal(working.convs[2].weight, model.convs[2].weight)
    # Of several neurons the most changed weights of all of them, wherever they are.
    keep[[36, 40]] = False
    working = run.working_copy()
    tsbd.reset_(run, working, keep)
    pooled = change[[3, 4, 8]]
    least = pooled.flatten().sort().values[-round(0.7 * pooled.numel())]
    reset = working.convs[1].weight.detach().flatten(1)[[3, 4, 8]] == 0
    assert torch.equal(reset, pooled >= least)


@pytest.mark.usefixtures("short")
def test_as_many_are_reset_as_accuracy_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network()
    run = Run(model, data, 0, CONFIG)
    ranking = tsbd.rank(run)
    before = predict(run.plain, data, 64, run.device).argmax(1)
    for budget in (0.0, 0.3):
        monkeypatch.setattr(tsbd, "BUDGET", budget)
        keep = tsbd.rule(run, ranking)
        count = int((~keep).sum())
        assert (~keep).nonzero().flatten().tolist() == sorted(ranking[1][:count].tolist())
        working = run.working_copy()
        tsbd.reset_(run, working, keep)
        after = predict(working, data, 64, run.device).argmax(1)
        lost = float((before == data.labels).float().mean() - (after == data.labels).float().mean())
        assert lost <= budget + 0.1  # a standard error above the limit
    assert count > 0


def test_the_loss_that_recovers_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(rnp, "learn_mask", lambda run, model, steps, rate, gradient: seen.update(gradient=gradient))
    rnp.rank(type("Run", (), {"unlearned": None})())
    assert torch.equal(seen["gradient"](lambda where: 5 * where, torch.ones(3)), torch.ones(3))


@pytest.mark.usefixtures("short")
def test_dormant_neurons_go_first() -> None:
    model, data = network()
    run = Run(model, data, 0, CONFIG)
    score, order = fine_pruning.rank(run)
    found = []
    handle = model.head.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(run.learning.images)
    handle.remove()
    expected = found[0].mean(0)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-6)
    assert int(order[0]) == int(expected.argmin())
    keep = torch.ones(len(expected), dtype=torch.bool)
    keep[order[:4]] = False
    working = run.working_copy()
    fine_pruning.prune_and_finetune_(run, working, keep)
    assert working.head.weight[:, order[:4]].eq(0).all()
    assert working.head.weight[:, order[4:]].ne(0).all()
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    with pytest.raises(ModelError, match="has none"):
        fine_pruning.rank(Run(nn.Sequential(*layers), data, 0, CONFIG))


def test_statistics_are_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    data = DefenceSet(torch.randn(24, 3, 4, 4) * 2 + 1, torch.arange(24) % 2)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    training.renew_statistics_(model, data, 24)
    torch.testing.assert_close(model[0].running_mean, data.images.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, data.images.transpose(0, 1).flatten(1).var(1))
    assert model[0].momentum == 0.1
    assert not any(module.training for module in model.modules())


@pytest.mark.usefixtures("short")
def test_training_holds_pruned_neurons_at_zero() -> None:
    model, data = network()
    run = Run(model, data, 0, CONFIG)
    keep = torch.ones(192, dtype=torch.bool)
    keep[:5] = False
    working = copy.deepcopy(model)
    common.prune_(working, run.sites, keep)
    training.train_(run, working, keep)
    assert working.norms[0].weight[:5].eq(0).all()
    assert working.norms[0].weight[5:].ne(model.norms[0].weight[5:]).any()
