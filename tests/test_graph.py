"""The graph level against the module level: the same numbers, on every architecture that the modules are tested on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from networks import ARCHITECTURES, SMALL, Stranger, logits, make, narrow_resnet18, randomize, snapshot
from test_optimize import quadrants, small, taught
from torch import Tensor, nn

from mnp_fast import PruneConfig
from mnp_fast.graph import Captured, capture, program
from mnp_fast.masked import Execution, masked
from mnp_fast.ops import force_backend
from mnp_fast.optimize import learn_masks
from mnp_fast.progress import Progress
from mnp_fast.sites import Site, find_sites, total_neurons

# Why these are not captured; every other one must be.
NOT_CAPTURED: dict[str, str] = {}


def found(name: str) -> tuple[nn.Module, Tensor, tuple[Site, ...], Captured]:
    model, images = make((ARCHITECTURES | SMALL)[name])
    sites = find_sites(model, images)
    return model, images, sites, capture(model, sites, images)


def partial_mask(sites: tuple[Site, ...], seed: int = 0) -> Tensor:
    """Half of the masks at one, the others anywhere down to zero."""
    mask = 2 * torch.rand(total_neurons(sites), generator=torch.Generator().manual_seed(seed))
    return mask.clamp(max=1).requires_grad_()


def outputs(
    model: nn.Module, sites: tuple[Site, ...], images: Tensor, how: Execution, batch_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """(logits, gradient of the mask) of a loss that every logit counts in."""
    mask = partial_mask(sites)
    with masked(model, sites, mask, batch_statistics=batch_statistics, how=how):
        out = logits(model(images)).float()
        weights = torch.linspace(-1, 1, out.shape[1])
        (gradient,) = torch.autograd.grad((F.log_softmax(out, 1) * weights).sum(), mask)
    return out.detach(), gradient


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("name", [*ARCHITECTURES, *SMALL])
def test_architecture(name: str) -> None:
    model, images, sites, captured = found(name)
    if name in NOT_CAPTURED:
        assert captured.reason is not None
        assert NOT_CAPTURED[name] in captured.reason
        return
    assert captured.reason is None
    assert captured.batch is None
    before = snapshot(model)
    expected = outputs(model, sites, images, Execution())
    given = outputs(model, sites, images, Execution(captured))
    assert close(given[0], expected[0], 1e-4)
    assert close(given[1], expected[1], 1e-3)
    more = torch.cat([images, images.flip(-1), images[:1]])
    assert captured.takes(more)
    assert close(outputs(model, sites, more, Execution(captured))[0], outputs(model, sites, more, Execution())[0], 1e-4)
    assert snapshot(model) == before


# ---------------------------------------------------------------- batch statistics, training
@pytest.mark.parametrize("name", ["elu vgg", "narrow resnet18", "torchvision resnet50", "timm mobilenetv2_100"])
def test_batch_statistics(name: str) -> None:
    model, images, sites, captured = found(name)
    images = torch.cat([images, images.flip(-1), 0.5 * images])
    # float64 shows what is rounding: batch statistics of few numbers amplify it.
    expected = outputs(model, sites, images, Execution(), batch_statistics=True)
    given = outputs(model, sites, images, Execution(captured), batch_statistics=True)
    assert close(given[0], expected[0], 1e-2)
    assert close(given[1], expected[1], 5e-2)


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
        "_ConvolutionAffine": 53,
        "FrozenLinear": 1,
        "aten.max_pool2d.default": 1,
        "aten.adaptive_avg_pool2d.default": 1,
        "aten.flatten.using_ints": 1,
    }


def test_vit_has_frozen_products_and_fused_activations() -> None:
    model, _, sites, captured = found("timm vit_base_patch16")
    counted = kinds(model, sites, captured)
    assert counted["FrozenLinear"] == 49
    assert counted["_Act"] == 12
    assert counted["_Affine"] == 12  # heads
    assert counted["attention"] == 12 or any("attention" in name for name in counted)
    assert not any("gelu" in name or "dropout" in name or "aten.linear" in name for name in counted)


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("pictures", [1, 2, 3, 4, 7])
def test_any_number_of_pictures(pictures: int) -> None:
    model, images, sites, captured = found("narrow resnet18")
    images = torch.randn(pictures, *images.shape[1:], generator=torch.Generator().manual_seed(1))
    expected = outputs(model, sites, images, Execution())
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # pictures are shared out over the cores
        try:
            given = outputs(model, sites, images, Execution(captured))
        finally:
            torch.set_num_threads(before)
        assert close(given[0], expected[0], 1e-5)
        assert close(given[1], expected[1], 1e-4)


def test_other_pictures_go_through_the_modules() -> None:
    model, images, sites, captured = found("narrow resnet18")
    assert not captured.takes(images[:1])
    assert not captured.takes(images.double())
    larger = torch.randn(2, 3, 40, 40)
    assert not captured.takes(larger)
    assert close(
        outputs(model, sites, larger, Execution(captured))[0], outputs(model, sites, larger, Execution())[0], 0
    )


def test_the_mask_may_change_between_forwards() -> None:
    model, images, sites, captured = found("narrow resnet18")
    mask = torch.ones(total_neurons(sites))
    with torch.no_grad(), masked(model, sites, mask, how=Execution(captured)):
        first = model(images)
        mask[:16] = 0
        changed = model(images)
    assert not torch.equal(first, changed)
    with torch.no_grad(), masked(model, sites, mask):
        assert close(changed, model(images), 1e-5)


@pytest.mark.parametrize("name", ["narrow resnet18", "timm vit_base_patch16"])
def test_bfloat16_is_as_good_as_autocast(name: str) -> None:
    model, images, sites, captured = found(name)
    exact = outputs(model, sites, images, Execution())
    errors = []
    for how in (Execution(captured, torch.bfloat16), Execution(None, torch.bfloat16)):
        given = outputs(model, sites, images, how)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(given, exact, strict=True)])
    assert all(ours <= 2 * plain for ours, plain in zip(*errors, strict=True))


# ---------------------------------------------------------------- what cannot be captured
class Asks(nn.Module):
    """Its path depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = narrow_resnet18()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if bool(x.sum() > 0) else -x)


def test_a_strangers_own_modules_are_captured() -> None:
    torch.manual_seed(0)
    model, images = randomize(Stranger()).eval(), torch.randn(3, 3, 8, 8)
    del model._buffers["calls"]  # which no trace may change
    model.calls = 0
    sites = find_sites(model, images)
    captured = capture(model, sites, images)
    assert captured.reason is None
    expected = outputs(model, sites, images, Execution())
    given = outputs(model, sites, images, Execution(captured))
    assert close(given[0], expected[0], 1e-4)
    assert close(given[1], expected[1], 1e-3)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: randomize(Stranger()), "changes buffers"),
        (Asks, "torch.export"),
        (lambda: narrow_resnet18().double(), "not all float32"),
    ],
)
def test_reasons(model: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    network = model().eval()
    size = 8 if isinstance(network, Stranger) else 32
    images = torch.randn(2, 3, size, size, dtype=next(network.parameters()).dtype)
    sites = find_sites(network, images)
    before = {key: value for key, value in snapshot(network).items() if not isinstance(value, int)}
    captured = capture(network, sites, images)
    # A trace that fails puts equal tuples in the place of some of a module's own.
    after = snapshot(network)
    assert all(after[key] == value for key, value in before.items())
    assert captured.reason is not None
    assert reason in captured.reason
    assert "\n" not in captured.reason
    mask = torch.ones(total_neurons(sites))
    with torch.no_grad(), masked(network, sites, mask, how=Execution(captured)):
        assert logits(network(images)).shape[0] == 2


def test_one_picture_is_too_few() -> None:
    model, images, sites, _ = found("narrow resnet18")
    assert "two pictures" in str(capture(model, sites, images[:1]).reason)


# ---------------------------------------------------------------- the same masks
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
    config = PruneConfig(batch_size=40, mask_steps=50, mask_rate=0.05)
    found = []
    for how, backend in ((Execution(), "reference"), (Execution(captured), None)):
        with force_backend(backend) if backend else nullcontext():
            generator = torch.Generator().manual_seed(0)
            arguments = (model, suppressed, sites, torch.linspace(0.5, 1.5, 16), data, config, generator)
            found.append(learn_masks(*arguments, Progress(False), how))
    assert 0.1 < float((found[0][0] < 0.9).float().mean()) < 0.9  # some have moved and some have not
    assert float((found[0][0] - found[1][0]).abs().max()) <= 1e-4
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(torch.tensor(found[0][2].loss), torch.tensor(found[1][2].loss), rtol=1e-4, atol=1e-5)
