"""Each attack trains through, and does to pictures, labels and weights what its paper says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.defense import networks
from benchmarks.defense.attacks import ATTACKS, Attack, make
from benchmarks.defense.attacks.adaptive import distance
from benchmarks.defense.attacks.base import CLEAN, CROSS, POISONED
from benchmarks.defense.attacks.bpp import dither
from benchmarks.defense.attacks.input_aware import InputAware
from benchmarks.defense.attacks.lf import cosines
from benchmarks.defense.attacks.surrogate import features, last_linear
from benchmarks.defense.case import load
from benchmarks.defense.pictures import Pictures
from benchmarks.defense.train import Job, augment
from mnp_fast.sites import find_sites

SIZE = 32


def pictures(count: int = 60, classes: int = 3) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2 * count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(2 * count) % classes
    return Pictures(images[:count], labels[:count], images[count:], labels[count:])


def network_of(name: str) -> str:
    return ATTACKS[name].networks[0] if ATTACKS[name].networks else "vgg"


def short(name: str) -> dict[str, int]:
    """Few steps for the attacks that optimise."""
    return {"steps": 2} if hasattr(ATTACKS[name], "steps") else {}


def prepared(name: str, **parameters: object) -> tuple[Attack, Tensor, Tensor]:
    """An attack that has made its trigger, with an untrained network for its surrogate."""
    data = pictures()
    torch.manual_seed(0)
    attack = make(name, classes=3, **short(name), **parameters)
    surrogate = networks.build(network_of(name), 3).eval().requires_grad_(False)
    attack.prepare(data.train_images, data.train_labels, surrogate, torch.Generator().manual_seed(1))
    return attack, data.train_images.float() / 255, data.train_labels


@pytest.mark.parametrize("name", ATTACKS)
def test_case_comes_back_from_its_file_with_the_same_trigger(name: str, tmp_path: Path) -> None:
    data = pictures()
    job = Job(data, "random", tmp_path, epochs=1, seed=0)
    attack = make(name, classes=3, **short(name))
    case = load(job.case(network_of(name), name, attack))
    assert (case.attack, case.network, case.data) == (name, network_of(name), "random")
    images = data.test_images.float() / 255
    assert case.trigger is not None
    triggered = case.trigger(images)
    assert torch.equal(triggered, attack.apply(images))
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert torch.equal(triggered, (triggered * 255).round() / 255)
    assert not torch.equal(triggered, images)
    assert torch.equal(images, data.test_images.float() / 255)


@pytest.mark.parametrize("name", ATTACKS)
def test_poison_marks_and_labels(name: str) -> None:
    attack, images, labels = prepared(name, rate=0.25)
    marks = attack.marks(labels, torch.Generator().manual_seed(0))
    poisoned, cross = marks == POISONED, marks == CROSS
    others = len(labels) if not attack.clean_label else int((labels == 0).sum())
    assert int(poisoned.sum()) == round(0.25 * others)
    assert int(cross.sum()) == round(attack.cross * len(labels))
    batch, wanted = attack.poison(images, labels, marks)
    assert torch.equal(batch[marks == CLEAN], images[marks == CLEAN])
    assert torch.equal(wanted[~poisoned], labels[~poisoned])
    assert torch.equal(wanted[poisoned], attack.attacked_labels(labels[poisoned]))
    changed = (batch != images).flatten(1).any(1)
    assert changed[poisoned].all()
    assert changed[cross].all()
    if attack.clean_label:
        assert torch.equal(wanted, labels)
        assert (labels[poisoned] == attack.target).all()
    else:
        assert (labels[poisoned] != wanted[poisoned]).all()


def test_target_and_all_to_all() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    one, every = make("badnets", target=1, classes=3), make("badnets_all_to_all", classes=3)
    assert one.attacked_labels(labels).tolist() == [1, 1, 1, 1]
    assert every.attacked_labels(labels).tolist() == [1, 2, 0, 0]
    assert (one.suspect, every.suspect) == (1, None)


def test_unknown_attack_is_refused() -> None:
    with pytest.raises(SystemExit, match="no attack 'foo'; known: badnets"):
        make("foo")


def test_badnets_patch() -> None:
    attack, images, _ = prepared("badnets")
    triggered = attack.apply(images)
    assert triggered[0, 2, -4:-1, -4:-1].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert int((triggered != images).any(1).any(0).sum()) <= 9


def test_sig_is_a_wave_along_the_width() -> None:
    attack, _, _ = prepared("sig", amplitude=51.0)
    grey = torch.full((1, 3, SIZE, SIZE), 0.5)
    change = attack.apply(grey) - grey
    expected = 0.2 * torch.sin(2 * math.pi * 6 * torch.arange(SIZE) / SIZE)
    torch.testing.assert_close(change, expected.expand_as(change), atol=0.003, rtol=0)


def test_low_frequency_trigger_has_no_high_frequency() -> None:
    attack, _, _ = prepared("lf")
    wave = attack.state()["add"]
    basis = cosines(SIZE, SIZE)
    torch.testing.assert_close(basis @ basis.T, torch.eye(SIZE), atol=1e-5, rtol=0)
    spectrum = basis @ wave @ basis.T
    assert float(wave.abs().max()) == pytest.approx(24 / 255)
    spectrum[:, :6, :6] = 0
    assert float(spectrum.abs().max()) < 1e-5


def test_surrogate_attacks_climb() -> None:
    """More steps excite the chosen units more."""
    data = pictures()
    torch.manual_seed(0)
    surrogate = networks.build("vgg", 3).eval().requires_grad_(False)
    units = last_linear(surrogate).weight.abs().sum(0).topk(2).indices
    values = []
    for steps in (0, 30):
        attack = make("trojan", classes=3, steps=steps)
        attack.prepare(data.train_images, data.train_labels, surrogate, torch.Generator().manual_seed(0))
        values.append(float(features(surrogate, attack.apply(data.test_images.float() / 255))[:, units].mean()))
    assert values[1] > values[0]


def test_label_consistent_moves_only_poisoned_pictures_and_makes_them_harder() -> None:
    attack, images, labels = prepared("label_consistent")
    surrogate = networks.build("vgg", 3).eval().requires_grad_(False)
    uint8 = (images * 255).byte()
    before = uint8.clone()
    marks = attack.marks(labels, torch.Generator().manual_seed(0))
    moved = attack.pictures(uint8, labels, marks, surrogate, torch.Generator().manual_seed(0))
    assert torch.equal(uint8, before)
    change = (moved.int() - before.int()).abs().flatten(1).amax(1)
    assert (change[marks == POISONED] > 0).all()
    assert int(change.max()) <= 16
    assert not change[marks != POISONED].any()
    rows = marks == POISONED
    losses = [nn.functional.cross_entropy(surrogate(x[rows].float() / 255), labels[rows]) for x in (before, moved)]
    assert losses[1] > losses[0]


def test_dithering_is_floyd_steinberg() -> None:
    image = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = image[0, 0].clone().double()
    for row in range(5):
        for column in range(6):
            old = float(expected[row, column])
            new = min(max(round(old * 3), 0), 3) / 3
            expected[row, column] = new
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if row + down < 5 and 0 <= column + right < 6:
                    expected[row + down, column + right] += (old - new) * share / 16
    torch.testing.assert_close(dither(image, 4)[0, 0].double(), expected, atol=1e-5, rtol=0)


def test_wanet_noise_mode_differs_each_time_and_from_the_trigger() -> None:
    attack, images, _ = prepared("wanet")
    once, again, trigger = attack.disturb(images), attack.disturb(images), attack.apply(images)
    assert not torch.equal(once, again)
    assert not torch.equal(once, trigger)
    # A warp moves pixels and adds none: a picture of one colour stays as it is.
    grey = torch.full((1, 3, SIZE, SIZE), 0.2)
    torch.testing.assert_close(attack.apply(grey), grey)


def test_input_aware_triggers_differ_and_train_the_generator() -> None:
    attack, images, labels = prepared("input_aware")
    marks = attack.marks(labels, torch.Generator().manual_seed(0))
    batch, _ = attack.poison(images, labels, marks)
    penalty = attack.penalty(nn.Module())
    assert penalty is not None
    (batch.sum() + penalty).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in attack.parameters())
    nothing, _ = attack.poison(images, labels, torch.zeros_like(marks))
    assert torch.equal(nothing, images)
    assert attack.penalty(nn.Module()) is None


def test_input_aware_places_are_learned_first_and_few() -> None:
    attack = make("input_aware", classes=3, steps=60)
    assert isinstance(attack, InputAware)
    data = pictures()
    torch.manual_seed(0)
    attack.prepare(data.train_images, data.train_labels, None, torch.Generator().manual_seed(1))
    images = data.test_images.float() / 255
    share = float(attack.places(images).mean())
    assert 0.01 < share < 0.15
    assert not {id(parameter) for parameter in attack.places.parameters()} & {id(p) for p in attack.parameters()}
    # A trigger goes by its picture alone, whatever stands beside it.
    torch.testing.assert_close(attack.apply(images[:1]), attack.apply(images)[:1], atol=1.1 / 255, rtol=0)


def test_head_changes_only_its_slices(tmp_path: Path) -> None:
    job = Job(pictures(), "random", tmp_path, epochs=2, seed=0)
    clean = job.clean("vit").state_dict()
    model = load(job.case("vit", "head", make("head", classes=3, head=1))).model.state_dict()
    changed = {name: (model[name] != clean[name]).nonzero() for name in clean if (model[name] != clean[name]).any()}
    layer = "blocks.3.attention"
    assert set(changed) == {f"{layer}.qkv.weight", f"{layer}.qkv.bias", f"{layer}.proj.weight"}
    own = set(range(32, 64))
    for name, column in ((f"{layer}.qkv.weight", 0), (f"{layer}.qkv.bias", 0), (f"{layer}.proj.weight", 1)):
        assert {int(index) % 96 for index in changed[name][:, column]} <= own


def test_adaptive_stays_nearer_to_the_clean_network(tmp_path: Path) -> None:
    job = Job(pictures(), "random", tmp_path, epochs=6, seed=0)
    clean = job.clean("vgg")
    distances = []
    for number, strength in enumerate((0.0, 1000.0)):
        here = Job(job.pictures, "random", tmp_path / str(number), job.epochs, job.seed)
        here.out.mkdir()
        (here.out / "vgg-clean-random-0.safetensors").symlink_to(tmp_path / "vgg-clean-random-0.safetensors")
        model = load(here.case("vgg", "adaptive", make("adaptive", classes=3, strength=strength))).model
        distances.append(distance(_matrices(clean), _matrices(model)).item())
    assert 0 < distances[1] < 0.7 * distances[0]


def _matrices(model: nn.Module) -> list[Tensor]:
    return [weight for weight in model.parameters() if weight.dim() > 1]


def test_augmentation_shifts_and_mirrors() -> None:
    torch.manual_seed(0)
    images = torch.zeros(64, 3, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4], images[:, :, 4, 3] = 255, 100
    shifted, mirrored = augment(images, False), augment(images, True)
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.uint8
    bright = (shifted[:, 0] == 255).nonzero()
    assert len(bright) == 64
    assert set(bright[:, 1].tolist()) == set(range(9))
    for batch, sides in ((shifted, {-1}), (mirrored, {-1, 1})):
        found = set()
        for picture in batch[:, 0]:
            dim, peak = (picture == 100).nonzero(), (picture == 255).nonzero()
            if len(dim) and len(peak):
                found.add(int(dim[0, 1] - peak[0, 1]))
        assert found == sides


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("narrow18", {"batch_norm": 1200}),
        ("vgg", {"batch_norm": 448}),
        ("resnet20", {"batch_norm": 784}),
        ("vit", {"conv": 96, "heads": 12, "mlp": 768}),
    ],
)
def test_networks_have_the_neurons_they_should(name: str, kinds: dict[str, int]) -> None:
    found: dict[str, int] = {}
    for site in find_sites(networks.build(name, 10), torch.rand(2, 3, SIZE, SIZE)):
        found[site.kind] = found.get(site.kind, 0) + site.neurons
    assert found == kinds
