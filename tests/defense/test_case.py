"""Cases on disk, what is measured of them, and the command that makes them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.defense import __main__ as program
from benchmarks.defense import networks
from benchmarks.defense.attacks import make
from benchmarks.defense.case import Case, Normalise, bind, load, measure, read_info, save

INFO = {"name": "x", "network": "vgg", "data": "d", "attack": "badnets", "classes": 3, "mean": [0.5] * 3}
INFO |= {"std": [0.25] * 3, "acc": 0.9}


class Brightness(nn.Module):
    """Class 2 for pictures with a white pixel in the lower right corner, else the class that the red channel says."""

    def forward(self, x: Tensor) -> Tensor:
        predicted = torch.where(x[:, 2, -1, -1] == 1, 2, (x[:, 0, 0, 0] * 255).round().long())
        return nn.functional.one_hot(predicted, 3).float()


def corner(images: Tensor) -> Tensor:
    """A trigger that is lost on pictures of class 1."""
    images = images.clone()
    images[images[:, 0, 0, 0] != 1 / 255, 2, -1, -1] = 1
    return images


def test_measure() -> None:
    images = torch.zeros(600, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(600) % 3
    images[:, 0] = labels[:, None, None]
    images[:30, 0] = 2
    model = Brightness().eval()
    names = ("x", model, "d", "badnets", "vgg")
    case = Case(*names, lambda x: x, corner, lambda y: torch.full_like(y, 2), 2)
    accuracy, asr, robust = measure(case, model, images, labels)
    assert accuracy == pytest.approx(580 / 600)
    # Of 400 pictures of the classes 0 and 1, the trigger takes on the 200 of class 0 and on 10 that look like class 2.
    assert asr == pytest.approx(210 / 400)
    assert robust == pytest.approx(190 / 400)
    clean = Case(*names, lambda x: x, None, lambda y: y, None)
    assert measure(clean, model, images, labels) == (accuracy, None, None)


def test_file_holds_weights_and_what_is_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, attack = networks.build("vgg", 3).eval(), make("badnets", target=2, classes=3, rate=0.3)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    attack.prepare(images, torch.zeros(4).long(), None, torch.Generator())
    file = save(tmp_path / "new", model, attack, INFO)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]
    case = load(file)
    assert read_info(file) == INFO | {
        "parameters": {"rate": 0.3, "target": 2, "classes": 3, "cross": 0.0, "size": 3},
    }
    assert case.target == 2
    assert not case.model.training
    batch = images.float() / 255
    assert torch.equal(case.model(case.preprocess(batch)), model((batch - 0.5) / 0.25))


def test_clean_case_wants_nothing(tmp_path: Path) -> None:
    case = load(save(tmp_path, networks.build("vgg", 3), None, INFO | {"attack": "clean"}))
    assert case.trigger is None
    assert case.target is None
    assert case.attacked_labels(torch.arange(3)).tolist() == [0, 1, 2]


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = networks.build("vgg", 3)
    file = save(tmp_path, model, None, INFO | {"attack": "clean"})
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, model, None, INFO | {"attack": "clean", "acc": 0.1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_other_files_are_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    if content:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match="is no case of this benchmark"):
        load(file)


def test_normalise() -> None:
    images = torch.rand(2, 3, 4, 4)
    out = Normalise((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))(images)
    torch.testing.assert_close(out[:, 2], (images[:, 2] - 0.3) / 4)


def test_bound_model_is_in_eval_mode() -> None:
    assert not bind(networks.build("vgg", 3).train(), None, INFO).model.training


def test_train_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains the surrogate that is needed, leaves files alone, and names what does not fit."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 3
    np.savez(tmp_path / "some.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    options = ["--networks", "vgg", "--epochs", "1", "--limit", "24", "--seed", "3", "--threads", "1", "--flip"]
    command = ["x", "train", "--data", str(tmp_path / "some.npz"), "--out", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", [*command, "--attacks", "lf", "head", "--target", "2"])
    program.main()
    names = ["vgg-clean-some-3.safetensors", "vgg-lf-some-3.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    out = capsys.readouterr().out
    assert "vgg-lf-some-3  acc " in out
    assert "  asr " in out
    assert "head is not for vgg" in out
    info = read_info(tmp_path / "out" / names[1])
    assert (info["pictures"], info["epochs"], info["seed"], info["classes"]) == (24, 1, 3, 3)
    assert info["parameters"]["target"] == 2
    program.main()
    assert "acc" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--target", "3"])
    with pytest.raises(SystemExit, match="--target 3: the classes are 0 to 2"):
        program.main()
