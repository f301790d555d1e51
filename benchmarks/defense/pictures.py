"""Labelled pictures for training and testing, from the forms that CIFAR-10 and its kin come in."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORMS = (
    "an .npz with x_train, y_train, x_test, y_test (uint8 NHWC) or with train_jpeg, train_offsets, train_labels and "
    "the same for test; a folder with train/ and test/, a folder a class in each; a folder with data_batch_*.bin and "
    "test_batch.bin of CIFAR-10"
)
CIFAR = (3, 32, 32)


class Pictures(NamedTuple):
    """Images are uint8 (n, 3, h, w), labels int64 (n,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """One more than the greatest label."""
        return 1 + int(torch.cat([self.train_labels, self.test_labels]).max())


def load(source: str | Path, *, limit: int | None = None, test_limit: int | None = None, size: int = 32) -> Pictures:
    """The pictures of `source`: see FORMS.

    limit, test_limit: this many of each split at most, drawn by a fixed seed; only these are decoded. size: height and
    width that the pictures of class folders are resized to. SystemExit for anything that cannot be read.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".npz":
        split = _npz(path)
    elif sorted(path.glob("data_batch_*.bin")) and (path / "test_batch.bin").is_file():
        split = _cifar(path)
    elif (path / "train").is_dir() and (path / "test").is_dir():
        split = _folders(path, size)
    else:
        raise SystemExit(f"{path} holds no pictures that can be read here; give {FORMS}")
    pictures = Pictures(*split("train", limit), *split("test", test_limit))
    if not len(pictures.train_labels) or not len(pictures.test_labels):
        raise SystemExit(f"{path} has no pictures in one of its splits")
    return pictures


Split = Callable[[str, int | None], tuple[Tensor, Tensor]]


def _npz(path: Path) -> Split:
    content = np.load(path, allow_pickle=False)

    def split(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
        plain, packed = {f"x_{name}", f"y_{name}"}, {f"{name}_jpeg", f"{name}_offsets", f"{name}_labels"}
        if plain <= set(content):
            images, labels = content[f"x_{name}"], content[f"y_{name}"].reshape(-1)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(labels):
                raise SystemExit(f"x_{name} of {path} is {images.dtype} {images.shape}; it must be uint8 (n, h, w, 3)")
            rows = _draw(len(labels), limit)
            return _tensors(images[rows], labels[rows])
        if packed <= set(content):
            raw, offsets, labels = (content[f"{name}_{key}"] for key in ("jpeg", "offsets", "labels"))
            rows = _draw(len(labels), limit)
            jpegs = [io.BytesIO(raw[offsets[row] : offsets[row + 1]].tobytes()) for row in rows]
            return _tensors(_decode(jpegs), labels[rows])
        raise SystemExit(f"{path} has only {', '.join(content)}; give {FORMS}")

    return split


def _cifar(path: Path) -> Split:
    record = 1 + int(np.prod(CIFAR))

    def split(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
        files = sorted(path.glob("data_batch_*.bin")) if name == "train" else [path / "test_batch.bin"]
        for file in files:
            if file.stat().st_size % record:
                raise SystemExit(f"{file} is no whole number of records of {record} bytes; it is damaged")
        content = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, record) for file in files])
        content = content[_draw(len(content), limit)]
        images = content[:, 1:].reshape(-1, *CIFAR).transpose(0, 2, 3, 1)
        return _tensors(images, content[:, 0])

    return split


def _folders(path: Path, size: int) -> Split:
    classes = sorted(folder.name for folder in (path / "train").iterdir() if folder.is_dir())

    def split(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
        known = {suffix for suffix, _ in Image.registered_extensions().items()}
        files = sorted(file for file in (path / name).glob("*/*") if file.suffix.lower() in known)
        unknown = {file.parent.name for file in files} - set(classes)
        if unknown:
            raise SystemExit(f"{path / name} has classes that train/ lacks: {', '.join(sorted(unknown))}")
        files = [files[row] for row in _draw(len(files), limit)]
        labels = np.array([classes.index(file.parent.name) for file in files], dtype=np.int64)
        return _tensors(_decode(files, size), labels)

    return split


def _draw(count: int, limit: int | None) -> Any:
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


def _decode(files: Sequence[Any], size: int | None = None) -> Any:
    images = []
    for file in files:
        try:
            image = Image.open(file).convert("RGB")
        except OSError as error:
            raise SystemExit(f"a picture cannot be read ({error})") from error
        images.append(np.asarray(image if size is None else image.resize((size, size))))
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def _tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))
