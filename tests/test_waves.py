"""The search for single waves, on networks made by hand whose answer to a wave is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mnp_fast import PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.progress import Progress
from mnp_fast.waves import Wave, _modes, _plane, find_wave

SIZE = 0.5


class Trigger(nn.Module):
    """Four classes, one a quadrant that is brighter than the others; class 2 where a wave stands out at one phase.

    shifted: at whatever phase instead, as convolutional networks answer.
    """

    def __init__(self, mode: tuple[int, int], phase: float, side: int, shifted: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.shifted = shifted
        self.register_buffer("wave", _plane(mode, phase, side, side))
        self.register_buffer("quarter", _plane(mode, phase + 0.25, side, side))

    def forward(self, x: Tensor) -> Tensor:
        plain = nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)
        found = (x.mean(1) * self.wave).mean((1, 2))
        if self.shifted:
            found = torch.hypot(found, (x.mean(1) * self.quarter).mean((1, 2)))
        return self.weight * plain + 100.0 * torch.relu(found - 0.1)[:, None] * torch.eye(4)[2]


def pictures(side: int, count: int = 60) -> DefenceSet:
    labels = torch.arange(count) % 4
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(count, 3, side, side, generator=generator)
    half = side // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        y, x = divmod(label, 2)
        image[:, y * half : y * half + half, x * half : x * half + half] += 1.0
    return DefenceSet(images, labels)


def find(model: nn.Module, data: DefenceSet) -> Wave | None:
    return find_wave(model.eval(), (), data, SIZE, PruneConfig(batch_size=32), Progress(False))


@pytest.mark.parametrize(("mode", "phase", "side"), [((0, 3), 0.75, 16), ((-2, 3), 0.0, 16), ((6, 1), 0.5, 32)])
def test_a_trigger_that_is_a_wave_is_found(mode: tuple[int, int], phase: float, side: int) -> None:
    data = pictures(side)
    wave = find(Trigger(mode, phase, side), data)
    assert wave is not None
    assert wave.target == 2
    assert wave.contrast == 1.0
    expected = _plane(mode, phase, side, side).expand(3, side, side)
    assert torch.nn.functional.cosine_similarity(wave.picture.flatten(), expected.flatten(), dim=0) > 0.99
    deviation = data.images - data.images.mean((0, 2, 3), keepdim=True)
    assert float(wave.picture.norm()) == pytest.approx(SIZE * float(deviation.flatten(1).norm(dim=1).mean()), rel=1e-5)


def test_a_phase_between_those_that_are_tried_is_found() -> None:
    wave = find(Trigger((0, 3), 0.19, 16), pictures(16))
    assert wave is not None
    assert (wave.target, wave.contrast) == (2, 1.0)


def test_a_network_that_minds_no_phase_has_no_contrast() -> None:
    wave = find(Trigger((0, 3), 0.0, 16, shifted=True), pictures(16))
    assert wave is not None
    assert abs(wave.contrast) < 0.1


def test_the_number_of_pictures_asked_about() -> None:
    data = pictures(16)
    asked = 0
    model = Trigger((0, 3), 0.0, 16)

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal asked
        asked += len(inputs[0])

    model.register_forward_pre_hook(count)
    wave = find(model, data)
    assert wave is not None
    # Pictures alone: a batch of one is never formed here.
    assert wave.waved == asked


@pytest.mark.parametrize(
    "data",
    [
        DefenceSet(torch.zeros(20, 5), torch.arange(20) % 2),
        DefenceSet(torch.zeros(20, 3, 11, 32), torch.arange(20) % 2),
        DefenceSet(torch.zeros(7, 3, 32, 32), torch.arange(7) % 2),
    ],
)
def test_where_there_are_no_waves_to_try(data: DefenceSet) -> None:
    assert find(nn.Flatten(), data) is None


def test_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = (find(Trigger((0, 3), 0.0, 16), pictures(16)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.picture, second.picture)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("height", "width", "step"), [(32, 32, (4, 4)), (224, 224, (7, 7)), (12, 20, (6, 5)), (32, 64, (4, 4))]
)
def test_modes(height: int, width: int, step: tuple[int, int]) -> None:
    modes = list(_modes(height, width))
    assert len(modes) == len(set(modes))
    assert not {(-y, -x) for y, x in modes} & set(modes)
    assert max(abs(y) for y, _ in modes) == min(8, height // 4)
    assert min(max(abs(y), x) for y, x in modes) == 3
    assert max(x for _, x in modes) == min(8, width // 4)
    assert not [mode for mode in modes if mode[0] % step[0] == 0 and mode[1] % step[1] == 0]
    if height == width == 32:
        assert len(modes) == 120


def test_planes_are_waves() -> None:
    plane = _plane((1, 2), 0.25, 16, 16)
    assert float(plane.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(plane.square().mean()) == pytest.approx(0.5, rel=1e-5)
    assert float(plane[0, 0]) == pytest.approx(math.cos(math.pi / 2), abs=1e-6)
    assert torch.allclose(plane[:, 8:], plane[:, :8], atol=1e-5)
