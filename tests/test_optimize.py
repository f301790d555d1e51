"""The loops on a small network: how far suppression goes, what the masks find, what fine-tuning leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import snapshot
from torch import Tensor, nn

from mnp_fast import ModelError, PruneConfig, optimize
from mnp_fast.data import DefenceSet
from mnp_fast.masked import masked, prune_
from mnp_fast.optimize import (
    add_perturbations_,
    finetune_,
    learn_masks,
    of_other_classes,
    perturb,
    predict,
    recalibrate_,
    suppress_,
)
from mnp_fast.progress import Progress
from mnp_fast.sites import find_sites, total_neurons

QUIET = Progress(False)
NONE = torch.zeros(1, 1, 6, 6)  # perturbations that are not used
RATES = (0.002, 0.02, 0.2, 1.0)


def quadrants(n: int = 120, seed: int = 0) -> DefenceSet:
    """Pictures (n, 1, 6, 6) of four classes: which quadrant is bright."""
    images = 0.3 * torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 3 * (label // 2), 3 * (label % 2)
        image[:, row : row + 3, column : column + 3] += 1.0
    return DefenceSet(images, labels)


def small() -> nn.Sequential:
    """Two convolutions with BatchNorm, 8 neurons each, and dropout."""
    convolutions = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)]
    first, second = ([conv, nn.BatchNorm2d(8), nn.ReLU()] for conv in convolutions)
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 4))


def taught(model: nn.Module, steps: int = 60) -> nn.Module:
    """Trained to know the quadrants; in eval mode."""
    data = quadrants(seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randperm(len(data), generator=generator)[:40]
        loss = F.cross_entropy(optimize.logits_of(model(data.images[index])), data.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def known() -> nn.Module:
    """Not to be changed by a test: copy it."""
    torch.manual_seed(0)
    model = taught(small())
    assert accuracy(model, quadrants()) == 1.0
    return model


def accuracy(model: nn.Module, data: DefenceSet, batch_statistics: bool = False) -> float:
    with masked(model, (), None, batch_statistics=batch_statistics):
        logits = predict(model, data, 40, torch.device("cpu"))
    return float((logits.argmax(1) == data.labels).float().mean())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def buffers(model: nn.Module) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in model.named_buffers()}


# ---------------------------------------------------------------- clean suppression
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("stop", [0.3, 0.6])
def test_suppression_ends_at_the_stop_whatever_the_rate(known: nn.Module, rate: float, stop: float) -> None:
    model, data = copy.deepcopy(known), quadrants()
    config = PruneConfig(batch_size=40, suppression_rate=rate, suppression_stop=stop, suppression_epochs=300)
    try:
        trace = suppress_(model, data, config, seeded(), QUIET)
    except ModelError:
        assert rate > 0.1  # a rate that destroys all at once may be given up, but not one near that of the defaults
        return
    assert trace.accuracy[-1] <= stop
    assert all(value > stop for value in trace.accuracy[1:-1])
    assert len(trace.loss) == len(trace.accuracy) == len(trace.rate)
    assert all(map(math.isfinite, (*trace.loss, *trace.rate)))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert accuracy(model, data, batch_statistics=True) <= stop + 0.1
    # No window that was kept fell by half, unless the rate was as low as it goes.
    falls = zip(trace.accuracy, trace.accuracy[1:], trace.rate[1:], strict=False)
    assert all(a - b <= 0.5 * trace.accuracy[0] or used <= rate / 16 for a, b, used in falls)


def test_suppression_touches_weights_alone(known: nn.Module) -> None:
    model, data = copy.deepcopy(known), quadrants()
    model.train()
    model[1].eval()
    before, weights = snapshot(model), tensors(model)
    suppress_(model, data, PruneConfig(batch_size=40, suppression_rate=0.02), seeded(), QUIET)
    names = {name for name, _ in model.named_parameters()}
    after = snapshot(model)
    assert {key for key in after if after[key] != before[key]} <= {f"{name} bits" for name in names}
    assert all(p.grad is None for p in model.parameters())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == names


def test_suppression_does_not_see_dropout(known: nn.Module) -> None:
    config = PruneConfig(batch_size=40, suppression_rate=0.02)
    models = [copy.deepcopy(known).train(), copy.deepcopy(known)]
    models[1][8] = nn.Dropout(0.9)
    traces = [suppress_(model, quadrants(), config, seeded(), QUIET) for model in models]
    assert traces[0] == traces[1]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_suppression_that_does_not_get_there(known: nn.Module) -> None:
    config = PruneConfig(batch_size=40, suppression_rate=1e-9, suppression_epochs=3)
    with pytest.raises(ModelError, match=r"did not bring the accuracy down.*raise suppression_rate"):
        suppress_(copy.deepcopy(known), quadrants(), config, seeded(), QUIET)


@pytest.mark.parametrize(
    ("pictures", "batch_size", "windows"),
    [
        (400, 128, [400]),
        (512, 128, [512]),
        (514, 128, [514]),
        (640, 128, [640]),
        (1600, 128, [512, 512, 576]),
        (1024, 1000, [1000, 24]),
        (1025, 1024, [1025]),
        (30, 16, [30]),
    ],
)
def test_windows_are_alike(pictures: int, batch_size: int, windows: list[int]) -> None:
    data = DefenceSet(torch.zeros(pictures, 1), torch.zeros(pictures, dtype=torch.long))
    passes = optimize._windows(data, batch_size, seeded())
    assert [sum(len(y) for _, y in next(passes)) for _ in 2 * windows] == 2 * windows


def test_what_answers_one_class_is_not_suppressed_where_the_loader_has_little_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimize, "_ascend", Script((0.1, 0.97), (0.2, 0.9), (0.5, 0.7), (0.6, 0.55)))
    labels = torch.zeros(100, dtype=torch.long)
    labels[::10] = 1
    data = DefenceSet(torch.zeros(100, 1, 6, 6), labels)
    trace = suppress_(zeroed(), data, PruneConfig(batch_size=40), seeded(), QUIET)
    assert trace.accuracy[-1] == 0.55  # under .6 of the first, and not already at 1.1 times the share of the class


class Script:
    """Stands for the steps of a window: weights and momenta grow by 1, and loss and accuracy come from a list."""

    def __init__(self, *windows: tuple[float, float]) -> None:
        self.windows: Iterator[tuple[float, float]] = iter(windows)
        self.rates: list[float] = []
        self.seen: list[float] = []

    def __call__(self, model, batches, parameters, momenta, rate, weight_decay):  # type: ignore[no-untyped-def]
        self.rates.append(rate)
        self.seen.append(float(parameters[0].flatten()[0].detach()))
        with torch.no_grad():
            for tensor in (*parameters, *momenta):
                tensor += 1
        assert float(momenta[0].flatten()[0]) == self.seen[-1] + 1
        return next(self.windows)


def test_steps_of_suppression_by_hand(known: nn.Module) -> None:
    """v = .9 v + g / |g| + mu p and p -= rate v, g the gradient of -cross-entropy, in float64."""
    model, reference, data = copy.deepcopy(known), copy.deepcopy(known).double(), quadrants(80)
    batches = list(data.batches(40, seeded()))
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    loss, share = optimize._ascend(model, batches, parameters, momenta, 0.1, 0.5)
    own = list(reference.parameters())
    speed = [torch.zeros_like(p) for p in own]
    losses, hits = [], []
    for images, labels in batches:
        logits = reference(images.double())
        losses.append(F.cross_entropy(logits, labels).item())
        hits.append(float((logits.argmax(1) == labels).double().mean()))
        gradients = torch.autograd.grad(-F.cross_entropy(logits, labels), own)
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for p, v, gradient in zip(own, speed, gradients, strict=True):
                v.mul_(0.9).add_(gradient / length + 0.5 * p)
                p.sub_(0.1 * v)
    for found, expected in zip((*parameters, *momenta), (*own, *speed), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (loss, share) == (pytest.approx(sum(losses) / 2, rel=1e-4), pytest.approx(sum(hits) / 2))


def zeroed() -> nn.Module:
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("bad", [(9.0, 0.1), (math.nan, 0.8), (math.inf, 0.8)])
def test_a_window_that_collapsed_is_taken_back(monkeypatch: pytest.MonkeyPatch, bad: tuple[float, float]) -> None:
    script = Script((0.1, 1.0), bad, (0.5, 0.7), (2.0, 0.2))
    monkeypatch.setattr(optimize, "_ascend", script)
    model = zeroed()
    config = PruneConfig(batch_size=40, suppression_rate=0.5)
    trace = suppress_(model, quadrants(), config, seeded(), QUIET)
    assert trace.accuracy == [1.0, 0.7, 0.2]
    assert trace.loss == [0.1, 0.5, 2.0]
    # The third window starts where the second did, momenta included, with shorter steps.
    assert script.seen == [0, 1, 1, 2]
    assert script.rates[2] < script.rates[1]
    assert all(bool((p == 3).all()) for p in model.parameters())


def test_steps_grow_while_accuracy_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(*[(0.1, 1.0)] * 40, (2.0, 0.1), (2.0, 0.1))
    monkeypatch.setattr(optimize, "_ascend", script)
    config = PruneConfig(batch_size=40, suppression_rate=0.01)
    with pytest.raises(StopIteration):  # the fall to 0.1 at once is taken back, until the script ends
        suppress_(zeroed(), quadrants(), config, seeded(), QUIET)
    assert script.rates[:40] == sorted(script.rates[:40])
    assert 2 * script.rates[0] < script.rates[39] < 100 * script.rates[0]


def test_weights_that_broke_in_the_last_steps_are_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script((0.1, 1.0), (0.5, 0.7), (2.0, 0.2), (2.0, 0.2))

    def breaks(model, batches, parameters, *rest):  # type: ignore[no-untyped-def]
        out = script(model, batches, parameters, *rest)
        if len(script.rates) == 3:
            with torch.no_grad():
                parameters[0].fill_(math.nan)
        return out

    monkeypatch.setattr(optimize, "_ascend", breaks)
    model = zeroed()
    try:
        suppress_(model, quadrants(), PruneConfig(batch_size=40), seeded(), QUIET)
    except ModelError:
        return
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# ---------------------------------------------------------------- masks
def test_masks(known: nn.Module) -> None:
    model, data = copy.deepcopy(known), quadrants()
    config = PruneConfig(batch_size=40, suppression_rate=0.02, mask_steps=25, mask_rate=0.1)
    suppressed = copy.deepcopy(known)
    suppress_(suppressed, data, config, seeded(), QUIET)
    recalibrate_(suppressed, data, config)
    sites = find_sites(model, data.images[:2])
    both = model, suppressed
    before = [snapshot(network) for network in both]
    magnitude = torch.linspace(0.5, 1.5, 16)
    masks, order, trace = learn_masks(*both, NONE, sites, magnitude, data, config, seeded(), QUIET)
    assert [snapshot(network) for network in both] == before
    assert all(p.grad is None for network in both for p in network.parameters())
    assert masks.shape == order.shape == (16,)
    assert masks.dtype == torch.float32
    assert not masks.requires_grad
    assert bool(((masks >= 0) & (masks <= 1)).all())
    assert len(masks.unique()) > 2
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(16))
    assert masks[order].tolist() == sorted(masks.tolist())
    assert len(trace.loss) == len(trace.accuracy) == 25
    # Under the masks the suppressed model is less wrong than it was, and the model itself keeps its accuracy.
    with masked(suppressed, sites, masks):
        after = F.cross_entropy(predict(suppressed, data, 40, masks.device), data.labels)
    assert after < F.cross_entropy(predict(suppressed, data, 40, masks.device), data.labels)
    again = learn_masks(*both, NONE, sites, magnitude, data, config, seeded(), QUIET)
    assert torch.equal(again[0], masks)
    assert torch.equal(again[1], order)
    other = learn_masks(*both, NONE, sites, magnitude, data, config, seeded(1), QUIET)
    assert not torch.equal(other[0], masks)


def test_steps_of_mask_learning_by_hand(known: nn.Module) -> None:
    """g of alpha sqrt L(suppressed) + (1 - alpha) L(model), v = .9 v + g + lambda M, m = clip(m - rate v), float64."""
    model, suppressed = planted(known, 3)
    data = quadrants()
    sites = find_sites(model, data.images[:2])
    magnitude = torch.linspace(0.5, 1.5, 16)
    # All pictures in every step, so that their order counts for nothing.
    config = PruneConfig(batch_size=120, mask_steps=4, mask_rate=0.05, alpha=0.8, penalty=0.02)
    found = learn_masks(model, suppressed, NONE, sites, magnitude, data, config, seeded(), QUIET)[0]
    mask = torch.ones(16, dtype=torch.float64, requires_grad=True)
    speed = torch.zeros(16, dtype=torch.float64)
    parts = {1: slice(0, 8), 4: slice(8, 16)}
    for _ in range(4):
        losses = []
        for network in (suppressed, model):
            net = copy.deepcopy(network).double()
            scaled = {f"{norm}.weight": net[norm].weight.detach() * mask[part] for norm, part in parts.items()}
            logits = torch.func.functional_call(net, scaled, (data.images.double(),))
            losses.append(F.cross_entropy(logits, data.labels))
        (gradient,) = torch.autograd.grad(0.8 * losses[0].sqrt() + 0.2 * losses[1], mask)
        speed = 0.9 * speed + gradient + 0.02 * magnitude
        mask = (mask.detach() - 0.05 * speed).clamp(0, 1).requires_grad_()
    assert float(mask.detach().min()) < 0.9  # they have moved
    torch.testing.assert_close(found.double(), mask.detach(), rtol=0, atol=1e-4)


def planted(model: nn.Module, neuron: int) -> tuple[nn.Module, nn.Module]:
    """(model, suppressed): a neuron of the second site that shouts class 0 in one and that the other does not use."""
    pair = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for network in pair:
            network[4].weight[neuron] = 1.0
            network[4].bias[neuron] = 0.0
            network[9].weight[:, 4 * neuron : 4 * neuron + 4] = 0.0
        pair[1][9].weight[0, 4 * neuron : 4 * neuron + 4] = 20.0
    return pair


@pytest.mark.parametrize("neuron", [0, 3, 7])
def test_a_bad_neuron_falls_first(known: nn.Module, neuron: int) -> None:
    model, suppressed = planted(known, neuron)
    data = quadrants()
    assert accuracy(suppressed, data, batch_statistics=True) < 0.5
    sites = find_sites(model, data.images[:2])
    config = PruneConfig(batch_size=40, mask_steps=40)
    masks, order, _ = learn_masks(model, suppressed, NONE, sites, torch.ones(16), data, config, seeded(), QUIET)
    assert order[0] == 8 + neuron
    assert masks[order[0]] < 0.5
    keep = torch.ones(16, dtype=torch.bool)
    keep[order[0]] = False
    prune_(suppressed, sites, keep)
    assert accuracy(suppressed, data, batch_statistics=True) > 0.9


def test_masks_at_zero_are_ordered_by_how_early_they_fell(known: nn.Module) -> None:
    # With nothing but the penalty in the way of the masks (the head sees none of them), magnitude sets the pace.
    blind = copy.deepcopy(known)
    with torch.no_grad():
        blind[9].weight.zero_()
    data = quadrants()
    magnitude = torch.arange(1.0, 17.0)[torch.randperm(16, generator=seeded())]
    config = PruneConfig(batch_size=40, mask_steps=60, mask_rate=0.1, penalty=0.05)
    sites = find_sites(blind, data.images[:2])
    masks, order, _ = learn_masks(blind, copy.deepcopy(blind), NONE, sites, magnitude, data, config, seeded(), QUIET)
    assert not masks.any()
    assert order.tolist() == magnitude.argsort(descending=True).tolist()


def test_without_anything_that_pulls_masks_stay_at_one(known: nn.Module) -> None:
    blind = copy.deepcopy(known)
    with torch.no_grad():
        blind[9].weight.zero_()
    data = quadrants()
    config = PruneConfig(batch_size=40, mask_steps=5, penalty=0)
    sites = find_sites(blind, data.images[:2])
    masks, _, _ = learn_masks(blind, copy.deepcopy(blind), NONE, sites, torch.ones(16), data, config, seeded(), QUIET)
    assert bool((masks == 1).all())


def test_only_the_suppressed_model_sees_perturbed_pictures(known: nn.Module) -> None:
    data = quadrants()
    config = PruneConfig(batch_size=40, mask_steps=1)
    sites = find_sites(known, data.images[:2])
    pair = copy.deepcopy(known), copy.deepcopy(known)
    perturbation = torch.zeros(1, 1, 6, 6)
    perturbation[..., 0, 0] = 5.0
    seen: list[Tensor] = []
    for network in pair:
        network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    learn_masks(*pair, perturbation, sites, torch.ones(16), data, config, seeded(), QUIET)
    images = next(data.batches(40, seeded()))[0]
    assert torch.equal(seen[0], images)
    added = seen[1] - images
    assert not added[..., 1:].any()
    scales = added[..., 0, 0].flatten() / 5.0
    assert bool(((scales > -1e-6) & (scales < 1 + 1e-6)).all())
    assert len(scales.unique()) > 20


def test_both_models_run_on_their_own_statistics(known: nn.Module) -> None:
    data = quadrants()
    config = PruneConfig(batch_size=40, mask_steps=5, mask_rate=0.1)
    sites = find_sites(known, data.images[:2])
    found = []
    for shifted in (None, 0, 1):
        pair = copy.deepcopy(known), copy.deepcopy(known)
        if shifted is not None:
            pair[shifted][1].running_mean += 3.0
        found.append(learn_masks(*pair, NONE, sites, torch.ones(16), data, config, seeded(), QUIET)[0])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---------------------------------------------------------------- fine-tuning
def pruned(model: nn.Module, data: DefenceSet):  # type: ignore[no-untyped-def]
    """(pruned copy, sites, keep): four neurons of each site are gone, and the head is shaken."""
    working = copy.deepcopy(model)
    sites = find_sites(working, data.images[:2])
    keep = torch.arange(total_neurons(sites)) % 2 == 0
    prune_(working, sites, keep)
    with torch.no_grad():
        working[9].weight += 0.3 * torch.randn(4, 32, generator=seeded())
    return working, sites, keep


def test_finetuning(known: nn.Module) -> None:
    data, teacher = quadrants(), copy.deepcopy(known)
    model, sites, keep = pruned(known, data)
    model.train()
    teacher.train()
    held, names = buffers(model), {name for name, _ in model.named_parameters()}
    before, untouched, old = snapshot(model), snapshot(teacher), tensors(model)
    config = PruneConfig(batch_size=40, finetune_epochs=8, finetune_rate=0.02)
    trace = finetune_(model, teacher, sites, keep, NONE, data, config, seeded(), QUIET)
    after = snapshot(model)
    assert {key for key in after if after[key] != before[key]} <= {f"{name} bits" for name in names}
    assert snapshot(teacher) == untouched
    assert all(p.grad is None for p in teacher.parameters())
    assert buffers(model) == held
    assert len(trace.loss) == len(trace.accuracy) == 8
    assert trace.loss[-1] < trace.loss[0]
    assert not any(bool(model[i].weight[1::2].any()) for i in (1, 4))
    assert all(bool(model[i].weight[::2].all()) for i in (1, 4))
    assert all(not torch.equal(old[name], model.get_parameter(name)) for name in names)
    assert accuracy(model, data) >= accuracy(pruned(known, data)[0], data)


def test_loss_and_accuracy_of_a_pass_are_means_over_the_pictures(known: nn.Module) -> None:
    # So short steps that the model stays the same; 110 pictures in batches of 20 leave a batch of 10.
    data = quadrants(110)
    model, sites, keep = pruned(known, data)
    config = PruneConfig(batch_size=40, finetune_epochs=1, finetune_rate=1e-9, distillation=0, weight_decay=0)
    trace = finetune_(model, copy.deepcopy(known), sites, keep, NONE, data, config, seeded(), QUIET)
    logits = predict(model, data, 40, torch.device("cpu"))
    assert trace.accuracy[0] == pytest.approx(float((logits.argmax(1) == data.labels).float().mean()), abs=1e-6)
    assert trace.loss[0] == pytest.approx(float(F.cross_entropy(logits, data.labels)), rel=1e-4)


@pytest.mark.parametrize(("distillation", "same"), [(1.0, True), (0.5, False)])
def test_what_distillation_learns_from(known: nn.Module, distillation: float, same: bool) -> None:
    """From the teacher alone, labels make no difference; otherwise they do."""
    data = quadrants()
    config = PruneConfig(batch_size=40, finetune_epochs=2, distillation=distillation)
    weights = []
    for labels in (data.labels, (data.labels + 1) % 4):
        model, sites, keep = pruned(known, data)
        part = DefenceSet(data.images, labels)
        finetune_(model, copy.deepcopy(known), sites, keep, NONE, part, config, seeded(), QUIET)
        weights.append(model[9].weight)
    assert torch.equal(*weights) == same


def test_what_each_picture_of_fine_tuning_is_given(known: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of every batch is perturbed, and learns what the teacher says of the picture as it was."""
    data = quadrants()
    model, sites, keep = pruned(known, data)
    pixel = torch.zeros(1, 1, 6, 6)
    pixel[..., 0, 0] = 5.0
    seen: list[Tensor] = []
    asked: list[tuple[Tensor, Tensor]] = []
    loss_of = optimize.repair_loss

    def noted(logits: Tensor, soft: Tensor, labels: Tensor, distillation: float) -> Tensor:
        asked.append((soft, labels))
        return loss_of(logits, soft, labels, distillation)

    monkeypatch.setattr(optimize, "repair_loss", noted)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    config = PruneConfig(batch_size=40, finetune_epochs=1, perturbed_pictures=0.3)
    finetune_(model, copy.deepcopy(known), sites, keep, pixel, data, config, seeded(), QUIET)
    assert len(seen) == len(asked) == 6
    rest = data.images.flatten(1)[:, 1:]
    for images, (soft, labels) in zip(seen, asked, strict=True):
        rows = [int((rest == image.flatten()[1:]).all(1).nonzero()) for image in images]
        added = (images - data.images[rows])[:, 0, 0, 0] / 5.0
        assert int((added != 0).sum()) == round(0.3 * 20)
        assert bool(((added > -1e-6) & (added < 1 + 1e-6)).all())
        assert len(added.unique()) > 3
        torch.testing.assert_close(soft, known(data.images[rows]).detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(labels, data.labels[rows])


class Standardised(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1, as in BiT and NFNets."""

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(input, 0.1 * (self.weight - mean) * torch.rsqrt(variance + 1e-8), self.bias, padding=1)


def test_a_pruned_filter_that_is_standardised_does_not_take_all_of_clipping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    data, teacher = quadrants(), taught(model.eval())
    start = [copy.deepcopy(model) for _ in range(2)]
    sites = find_sites(model, data.images)
    moved = []
    for network, pruned_too in zip(start, (False, True), strict=True):
        keep = torch.ones(total_neurons(sites), dtype=torch.bool)
        keep[0] = not pruned_too
        prune_(network, sites, keep)
        before = network[0].weight[1:].detach().clone()
        config = PruneConfig(batch_size=40, finetune_epochs=1, distillation=0)
        finetune_(network, teacher, sites, keep, NONE, data, config, seeded(), QUIET)
        moved.append(float((network[0].weight[1:].detach() - before).norm()))
    assert moved[1] > moved[0] / 2


def test_no_epochs_no_change(known: nn.Module) -> None:
    data = quadrants()
    model, sites, keep = pruned(known, data)
    before = snapshot(model)
    config = PruneConfig(finetune_epochs=0)
    trace = finetune_(model, copy.deepcopy(known), sites, keep, NONE, data, config, seeded(), QUIET)
    assert snapshot(model) == before
    assert trace.loss == []


# ---------------------------------------------------------------- perturbations
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_perturbations_pull_into_their_classes(known: nn.Module, batch_statistics: bool) -> None:
    model, data, targets = copy.deepcopy(known), quadrants(), [2, 0, 2]
    sites = find_sites(model, data.images[:2])
    before = snapshot(model)
    how = {"size": 1.5, "steps": 15, "batch_statistics": batch_statistics}
    found = perturb(model, targets, sites, data, PruneConfig(batch_size=40), seeded(), QUIET, **how)
    assert snapshot(model) == before
    assert found.shape == (3, 1, 6, 6)
    norms = found.flatten(1).norm(dim=1)
    radius = 1.5 * float((data.images - data.images.mean()).flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(norms, torch.full_like(norms, radius))
    random = torch.randn(6, 6, generator=seeded())
    with masked(model, (), None, batch_statistics=batch_statistics), torch.no_grad():
        for one, target in zip(found, targets, strict=True):
            others = data.images[data.labels != target]
            shares = [
                float((model(others + shift).argmax(1) == target).float().mean())
                for shift in (one, random * radius / random.norm())
            ]
            assert shares[0] > 0.9 > 0.6 > shares[1]
    assert not torch.equal(found[0], found[2])


def test_perturbations_go_on_from_where_they_were(known: nn.Module) -> None:
    model, data = copy.deepcopy(known), quadrants()
    sites = find_sites(model, data.images[:2])
    config = PruneConfig(batch_size=240)  # all pictures in a step: their order alone is drawn

    def further(targets: list[int], steps: int, start: Tensor | None = None) -> Tensor:
        how = {"size": 1.5, "steps": steps, "start": start, "batch_statistics": True}
        return perturb(model, targets, sites, data, config, seeded(), QUIET, **how)

    early = further([3], 4)
    kept = early.clone()
    torch.testing.assert_close(further([3], 3, early), further([3], 7), rtol=1e-3, atol=1e-3)
    assert torch.equal(early, kept)
    assert not torch.allclose(further([3], 7), early, rtol=1e-3, atol=1e-3)
    both = torch.cat([early, -early])
    assert torch.equal(further([3, 1], 0, both), both)


def test_recalibrated_statistics_are_those_of_the_pictures(known: nn.Module) -> None:
    data, model = quadrants(), copy.deepcopy(known)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with masked(model, (), None, batch_statistics=True), torch.no_grad():
        whole = model(data.images)
    recalibrate_(model, data, PruneConfig(batch_size=120))
    torch.testing.assert_close(model(data.images), whole, rtol=1e-4, atol=1e-4)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{layer}.running_{what}" for layer in (1, 4) for what in ("mean", "var")}
    assert not any(module._forward_pre_hooks for module in model.modules())
    # Batches of unequal size count by their pictures.
    other = copy.deepcopy(known)
    recalibrate_(other, data, PruneConfig(batch_size=50))
    torch.testing.assert_close(other.get_buffer("1.running_mean"), model.get_buffer("1.running_mean"))


def test_networks_without_statistics_have_nothing_to_recalibrate() -> None:
    networks = (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), nn.BatchNorm2d(1, track_running_stats=False))
    for network in networks:
        before = snapshot(network)
        recalibrate_(network, quadrants(), PruneConfig())
        assert snapshot(network) == before


def test_a_share_of_a_batch_is_perturbed() -> None:
    perturbations = torch.randn(3, 1, 6, 6, generator=seeded())
    images = torch.zeros(10, 1, 6, 6)
    add_perturbations_(images, perturbations, 0.5, seeded())
    assert not images[5:].any()
    for image in images[:5]:
        scales = (image / perturbations).flatten(1)
        fits = [torch.allclose(scale, scale[0].expand_as(scale), atol=1e-3) for scale in scales]
        assert sum(fits) == 1
        assert 0 <= float(scales[fits.index(True)][0]) <= 1
    add_perturbations_(images.zero_(), perturbations, 0.0, seeded())
    assert not images.any()


# ---------------------------------------------------------------- predict
@pytest.mark.parametrize("batch_size", [1, 7, 17, 120, 500])
def test_predict(known: nn.Module, batch_size: int) -> None:
    data = quadrants()
    out = predict(known, data, batch_size, torch.device("cpu"))
    assert out.dtype == torch.float32
    assert not out.requires_grad
    torch.testing.assert_close(out, known(data.images).detach(), rtol=1e-4, atol=1e-5)


def test_batch_statistics_where_one_picture_would_be_left_over() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    data = quadrants(41, 0)
    with masked(network, (), None, batch_statistics=True):
        for batch_size in (2, 5, 20):
            assert predict(network, data, batch_size, torch.device("cpu")).shape == (41, 4)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            network(data.images[:1])


def test_pictures_of_other_classes_are_never_one_alone() -> None:
    """Statistics of a batch need two."""
    images = torch.arange(4.0).view(4, 1, 1, 1)
    for labels, left in (([0, 0, 0, 1], 4), ([0, 0, 1, 1], 2), ([0, 0, 0, 0], 4)):
        assert len(of_other_classes(DefenceSet(images, torch.tensor(labels)), 0)) == left
