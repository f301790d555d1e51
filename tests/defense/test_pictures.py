"""The forms that pictures come in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.defense.pictures import load

RNG = np.random.default_rng(0)
TRAIN, TEST = (RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (12, 5))
LABELS, TEST_LABELS = np.arange(12) % 3, np.arange(5) % 3


def test_arrays(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, x_train=TRAIN, y_train=LABELS[:, None], x_test=TEST, y_test=TEST_LABELS)
    pictures = load(file)
    assert torch.equal(pictures.train_images, torch.from_numpy(TRAIN).permute(0, 3, 1, 2))
    assert pictures.train_labels.tolist() == LABELS.tolist()
    assert pictures.test_labels.dtype == torch.int64
    assert pictures.classes == 3
    few = load(file, limit=4, test_limit=2)
    assert (len(few.train_labels), len(few.test_labels)) == (4, 2)
    assert torch.equal(few.train_images, load(file, limit=4).train_images)
    for image, label in zip(few.train_images, few.train_labels, strict=True):
        (row,) = (pictures.train_images == image).all(3).all(2).all(1).nonzero().flatten()
        assert pictures.train_labels[row] == label


def test_jpeg_strings_of_which_only_the_drawn_are_decoded(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    for name, images, labels in (("train", TRAIN, LABELS), ("test", TEST, TEST_LABELS)):
        packed = [_jpeg(image) for image in images]
        content[f"{name}_jpeg"] = np.frombuffer(b"".join(packed), np.uint8)
        content[f"{name}_offsets"] = np.cumsum([0, *map(len, packed)])
        content[f"{name}_labels"] = labels
    np.savez(tmp_path / "a.npz", **content)
    pictures = load(tmp_path / "a.npz")
    expected = np.asarray(Image.open(io.BytesIO(_jpeg(TRAIN[7]))))
    assert torch.equal(pictures.train_images[7], torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert pictures.train_labels.tolist() == LABELS.tolist()
    drawn = load(tmp_path / "a.npz", limit=3).train_images
    content["train_jpeg"] = content["train_jpeg"].copy()
    kept = [int((pictures.train_images == image).flatten(1).all(1).nonzero()) for image in drawn]
    for row in set(range(12)) - set(kept):
        content["train_jpeg"][content["train_offsets"][row] : content["train_offsets"][row + 1]] = 0
    np.savez(tmp_path / "a.npz", **content)
    assert torch.equal(load(tmp_path / "a.npz", limit=3).train_images, drawn)
    with pytest.raises(SystemExit, match="cannot be read"):
        load(tmp_path / "a.npz")


def test_cifar_binaries(tmp_path: Path) -> None:
    for name, part in (("data_batch_1", slice(0, 8)), ("data_batch_2", slice(8, 12))):
        (tmp_path / f"{name}.bin").write_bytes(_records(TRAIN[part], LABELS[part]))
    (tmp_path / "test_batch.bin").write_bytes(_records(TEST, TEST_LABELS))
    pictures = load(tmp_path)
    assert torch.equal(pictures.train_images, torch.from_numpy(TRAIN).permute(0, 3, 1, 2))
    assert pictures.train_labels.tolist() == LABELS.tolist()
    assert pictures.test_labels.tolist() == TEST_LABELS.tolist()
    (tmp_path / "data_batch_2.bin").write_bytes(b"short")
    with pytest.raises(SystemExit, match=r"data_batch_2.bin is no whole number of records"):
        load(tmp_path)


def test_class_folders(tmp_path: Path) -> None:
    for split, images, labels in (("train", TRAIN, LABELS), ("test", TEST, TEST_LABELS)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:02}.png")
            (folder / "notes.txt").write_text("no picture")
    pictures = load(tmp_path)
    assert pictures.train_labels.tolist() == sorted(LABELS.tolist())
    assert torch.equal(pictures.train_images[1], torch.from_numpy(TRAIN[3]).permute(2, 0, 1))
    assert load(tmp_path, size=16).test_images.shape == (5, 3, 16, 16)
    (tmp_path / "test" / "new").mkdir()
    Image.fromarray(TEST[0]).save(tmp_path / "test" / "new" / "a.png")
    with pytest.raises(SystemExit, match="classes that train/ lacks: new"):
        load(tmp_path)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no pictures that can be read here"):
        load(tmp_path)
    with pytest.raises(SystemExit, match="holds no pictures that can be read here"):
        load(tmp_path / "missing.npz")
    np.savez(tmp_path / "a.npz", images=TRAIN)
    with pytest.raises(SystemExit, match="has only images"):
        load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x_train=TRAIN / 255, y_train=LABELS, x_test=TEST, y_test=TEST_LABELS)
    with pytest.raises(SystemExit, match="must be uint8"):
        load(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x_train=TRAIN[:0], y_train=LABELS[:0], x_test=TEST, y_test=TEST_LABELS)
    with pytest.raises(SystemExit, match="no pictures in one of its splits"):
        load(tmp_path / "c.npz")


def _jpeg(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG")
    return file.getvalue()


def _records(images: Any, labels: Any) -> bytes:
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None].astype(np.uint8), flat], 1).tobytes()
