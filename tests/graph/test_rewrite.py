"""The rewritten trace against the module level: the same numbers, one op a layer, and the masks of the reference."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from levels import close, close_in_every_site, found, outputs
from networks import logits
from test_optimize import quadrants, small, taught
from torch import nn

from mnp_fast import PruneConfig
from mnp_fast.graph.capture import capture
from mnp_fast.graph.rewrite import program
from mnp_fast.graph.trace import Captured
from mnp_fast.masked import Execution, masked
from mnp_fast.ops import force_backend
from mnp_fast.optimize import learn_masks
from mnp_fast.progress import Progress
from mnp_fast.sites import Site, find_sites, total_neurons


# ---------------------------------------------------------------- batch statistics, training
@pytest.mark.parametrize("name", ["elu vgg", "narrow resnet18", "torchvision resnet50", "timm mobilenetv2_100"])
def test_batch_statistics(name: str) -> None:
    model, images, sites, captured = found(name)
    images = torch.cat([images, images.flip(-1), 0.5 * images])
    # Batch statistics of few numbers amplify what rounding leaves.
    expected = outputs(model, sites, images, Execution(), batch_statistics=True)
    given = outputs(model, sites, images, Execution(captured), batch_statistics=True)
    assert close(given[0], expected[0], 1e-2)
    assert close_in_every_site(given[1], expected[1], sites, 5e-2)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_norms_without_bias_are_masked_too(batch_statistics: bool) -> None:
    torch.manual_seed(0)
    model = taught(small())
    for norm in (model[1], model[4]):
        norm.bias = None
    images = quadrants().images
    sites = find_sites(model, images)
    captured = capture(model, sites, images)
    assert captured.reason is None
    expected = outputs(model, sites, images, Execution(), batch_statistics)
    given = outputs(model, sites, images, Execution(captured), batch_statistics)
    assert close(given[0], expected[0], 1e-3)
    assert close(given[1], expected[1], 1e-2)
    gradients = []
    for how in (Execution(), Execution(captured)):  # and trained where nothing is masked
        with masked(model, (), None, batch_statistics=batch_statistics, how=how):
            loss = F.cross_entropy(model(images), quadrants().labels)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert close(gradients[1], gradients[0], 1e-2)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("name", ["narrow resnet18", "torchvision vit_b_16"])
def test_weights_are_trained_as_at_the_module_level(name: str, batch_statistics: bool) -> None:
    model, images, _, captured = found(name)
    images = torch.cat([images, images.flip(-1), 0.5 * images])
    gradients = []
    for how in (Execution(), Execution(captured)):
        trained = copy.deepcopy(model)
        with masked(trained, (), None, batch_statistics=batch_statistics, how=how):
            for _ in range(2):  # the second step sees what the first has changed in place
                loss = F.cross_entropy(logits(trained(images)), torch.arange(len(images)) % 5)
                found_now = torch.autograd.grad(loss, list(trained.parameters()), allow_unused=True)
                with torch.no_grad():
                    for parameter, gradient in zip(trained.parameters(), found_now, strict=True):
                        if gradient is not None:
                            parameter -= 1e-3 * gradient / gradient.norm().clamp_min(1e-6)
        gradients.append(torch.cat([g.flatten() for g in found_now if g is not None]))
    assert close(gradients[1], gradients[0], 2e-2 if batch_statistics else 1e-3)


# ---------------------------------------------------------------- what is fused
def kinds(model: nn.Module, sites: tuple[Site, ...], captured: Captured) -> Counter[str]:
    """Modules and functions of the rewritten graph."""
    run = program(captured, model, sites, torch.ones(total_neurons(sites)), batch_statistics=False, dtype=None)
    graph = run.module  # type: ignore[attr-defined]
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    names += [type(graph.get_submodule(str(n.target))).__name__ for n in graph.graph.nodes if n.op == "call_module"]
    return Counter(names)


def test_resnet50_is_one_op_a_layer() -> None:
    model, _, sites, captured = found("torchvision resnet50")
    assert kinds(model, sites, captured) == {
        "Region": 2,
        "FrozenLinear": 1,
        "aten.max_pool2d.default": 1,
        "aten.adaptive_avg_pool2d.default": 1,
        "aten.flatten.using_ints": 1,
    }


def test_vit_has_frozen_products_and_fused_activations() -> None:
    model, _, sites, captured = found("timm vit_base_patch16")
    counted = kinds(model, sites, captured)
    assert counted["FrozenLinear"] == 49
    assert counted["Act"] == 12
    assert counted["Affine"] == 12  # heads
    assert counted["attention"] == 12 or any("attention" in name for name in counted)
    assert not any("gelu" in name or "dropout" in name or "aten.linear" in name for name in counted)


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize("name", ["narrow resnet18", "timm vit_base_patch16"])
def test_bfloat16_is_as_good_as_autocast(name: str) -> None:
    model, images, sites, captured = found(name)
    exact = outputs(model, sites, images, Execution())
    errors = []
    for how in (Execution(captured, torch.bfloat16), Execution(None, torch.bfloat16)):
        given = outputs(model, sites, images, how)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(given, exact, strict=True)])
    assert all(ours <= 2 * plain for ours, plain in zip(*errors, strict=True))


def test_fifty_steps_give_the_masks_of_the_reference() -> None:
    torch.manual_seed(0)
    model = taught(small())
    suppressed = copy.deepcopy(model)
    with torch.no_grad():
        suppressed[9].weight.mul_(-0.5)  # wrong, but not by much
    data = quadrants()
    sites = find_sites(model, data.images[:2])
    captured = capture(model, sites, data.images[:2])
    assert captured.reason is None
    perturbations = 0.5 * torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    config = PruneConfig(batch_size=40, mask_steps=50, mask_rate=0.05)
    found = []
    for how, backend in ((Execution(), "reference"), (Execution(captured), None)):
        with force_backend(backend) if backend else nullcontext():
            generator = torch.Generator().manual_seed(0)
            arguments = (model, suppressed, perturbations, sites, torch.linspace(0.5, 1.5, 16), data, config, generator)
            found.append(learn_masks(*arguments, Progress(False), how))
    assert 0.1 < float((found[0][0] < 0.9).float().mean()) < 0.9  # some have moved and some have not
    assert float((found[0][0] - found[1][0]).abs().max()) <= 1e-4
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(torch.tensor(found[0][2].loss), torch.tensor(found[1][2].loss), rtol=1e-4, atol=1e-5)
