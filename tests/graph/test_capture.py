"""Capture: every architecture that the modules are tested on, and a reason where a model cannot be traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from levels import close, found, outputs
from networks import ARCHITECTURES, SMALL, Stranger, logits, narrow_resnet18, randomize, snapshot
from torch import Tensor, nn

from mnp_fast.graph.capture import capture
from mnp_fast.masked import Execution, masked
from mnp_fast.sites import find_sites, total_neurons

# Why these are not captured; every other one must be.
NOT_CAPTURED: dict[str, str] = {}


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


def test_other_pictures_go_through_the_modules() -> None:
    model, images, sites, captured = found("narrow resnet18")
    assert not captured.takes(images[:1])
    assert not captured.takes(images.double())
    larger = torch.randn(2, 3, 40, 40)
    assert not captured.takes(larger)
    assert close(
        outputs(model, sites, larger, Execution(captured))[0], outputs(model, sites, larger, Execution())[0], 0
    )


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
