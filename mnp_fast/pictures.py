"""Pictures from a folder or an .npz file, as a loader of normalised batches."""

from __future__ import annotations

import math
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mnp_fast.architectures import Preprocessing
from mnp_fast.errors import ConfigError, DataError, FileError

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True, eq=False)
class Pictures:
    """A re-iterable of batches (images, labels): (b, c, h, w) floating and (b,) int64.

    read: gives picture i as (c, h, w), floating. index: the pictures in use. labels: label of each of `index`.
    names: of the classes, where known.
    """

    read: Callable[[int], Tensor]
    index: list[int]
    labels: list[int]
    names: list[str] | None = None
    batch_size: int = 64

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = [self.read(i) for i in self.index[part]]
            for image in images[1:]:
                if image.shape != images[0].shape:
                    raise DataError(
                        f"the pictures differ in shape, {tuple(images[0].shape)} and {tuple(image.shape)}; give --size"
                    )
            yield torch.stack(images), torch.tensor(self.labels[part])

    def limited(self, limit: int, seed: int) -> Pictures:
        """At most `limit` pictures, drawn by `seed` and shared among the classes as evenly as they allow."""
        if limit < 1:
            raise ConfigError(f"the limit of pictures is {limit}; it must be at least 1")
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        seen: dict[int, int] = {}
        ranked: list[tuple[int, int, int]] = []
        for place in order:
            label = self.labels[place]
            seen[label] = seen.get(label, 0) + 1
            ranked.append((seen[label], len(ranked), place))
        return self._only(sorted(place for _, _, place in sorted(ranked)[:limit]))

    def aimed_at(self, target: int) -> Pictures:
        """The pictures of other classes than `target`, labelled `target`: what an attacker wants a model to answer."""
        others = self._only([place for place, label in enumerate(self.labels) if label != target])
        return replace(others, labels=[target] * len(others))

    def _only(self, places: list[int]) -> Pictures:
        return replace(self, index=[self.index[p] for p in places], labels=[self.labels[p] for p in places])


def read_pictures(
    path: Path, prepare: Preprocessing, batch_size: int = 64, floating: Preprocessing | None = None
) -> Pictures:
    """Pictures of a folder with one subfolder a class, or of an .npz file. Folders are decoded as they are iterated.

    Folder: the class is the place of the subfolder's name among the sorted names ("10" before "2"), as in torchvision's
    ImageFolder; a class without pictures needs an empty subfolder. Pictures, of 8 or 16 bits, become RGB in [0, 1];
    where a size is given and they have another, the shorter side is resized to it, or by `margin` larger, and the
    centre cropped; then mean and std.
    .npz: arrays x or images, and y or labels. 8-bit ones, (n, h, w, c), (n, c, h, w) or (n, h, w), are treated like a
    folder's pictures; floating ones, (n, c, h, w), may have been prepared already: `floating` is for them, by default
    `prepare`, of which they get mean and std.
    FileError, DataError for what cannot be read.
    """
    if batch_size < 1:
        raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
    if path.is_dir():
        return _folder(path, prepare, batch_size)
    if not path.exists():
        raise FileError(f"{path} does not exist; give a folder with one subfolder a class, or an .npz file")
    if path.suffix != ".npz":
        raise FileError(f"{path} is neither a folder nor an .npz file; give one of these")
    return _npz(path, prepare, batch_size, prepare if floating is None else floating)


def _folder(path: Path, prepare: Preprocessing, batch_size: int) -> Pictures:
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{path} has no subfolders; put the pictures of each class into a subfolder of its own")
    found = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not found:
        raise DataError(f"the subfolders of {path} hold no pictures ({', '.join(sorted(SUFFIXES))})")

    def read(i: int) -> Tensor:
        file = found[i][0]
        try:
            with Image.open(file) as picture:
                return _prepared(_in_8_bits(picture), prepare)
        except (ConfigError, DataError):
            raise
        except Exception as error:
            # Pillow answers damaged files with many types: OSError, SyntaxError, ValueError, DecompressionBombError.
            raise DataError(f"{file} cannot be read as a picture ({error}); mend or remove it") from error

    return Pictures(read, list(range(len(found))), [label for _, label in found], classes, batch_size)


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits. Pillow's own conversion takes numbers above 255 for white."""
    # Older versions of Pillow open PNGs of 16 bits as I.
    if picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG"):
        return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise DataError(
            f"{getattr(picture, 'filename', 'a picture')} has numbers of 32 bits (mode {picture.mode}), whose white is "
            "not known; give pictures of 8 or 16 bits"
        )
    return picture.convert("RGB")


def _npz(path: Path, prepare: Preprocessing, batch_size: int, floating: Preprocessing) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = _array(archive, path, ("x", "images")), _array(archive, path, ("y", "labels"))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise FileError(f"{path} is truncated, or no .npz file of plain arrays ({error}); write it anew") from error
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"the labels of {path} are {labels.dtype} {labels.shape}; they must be integers (n,)")
    if len(images) != len(labels):
        raise DataError(f"{path} has {len(images)} pictures but {len(labels)} labels; each needs exactly one")
    if images.dtype == np.uint8:
        images = _channels_last(images, path)
    elif images.dtype.kind != "f" or images.ndim != 4:
        raise DataError(
            f"the pictures of {path} are {images.dtype} {images.shape}; "
            "give 8-bit (n, h, w, c) or floating (n, c, h, w) ones"
        )
    elif floating.size is not None and images.shape[2:] != (floating.size, floating.size):
        raise ConfigError(
            f"the pictures of {path} are floating, {images.shape}; only 8-bit ones can be resized to --size"
        )

    def read(i: int) -> Tensor:
        if images.dtype == np.uint8:
            array = images[i]
            return _prepared(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), prepare)
        return _normalised(torch.from_numpy(images[i].copy()), floating)

    return Pictures(read, list(range(len(labels))), labels.astype(np.int64).tolist(), None, batch_size)


def _array(archive: np.lib.npyio.NpzFile, path: Path, names: tuple[str, str]) -> np.ndarray:
    for name in names:
        if name in archive.files:
            return archive[name]
    raise DataError(f"{path} has no array {' or '.join(names)}, only {', '.join(archive.files) or 'none'}; name it so")


def _channels_last(images: np.ndarray, path: Path) -> np.ndarray:
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[-1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    raise DataError(f"the pictures of {path} have shape {images.shape}; give (n, h, w, c) with 1 or 3 channels")


def _prepared(picture: Image.Image, prepare: Preprocessing) -> Tensor:
    if prepare.size is not None and picture.size != (prepare.size, prepare.size):
        # Rounded down as timm does; 1e-6 for a margin that is a rounded quotient.
        shorter = math.floor(prepare.size * prepare.margin + 1e-6)
        width, height = (max(prepare.size, round(side * shorter / min(picture.size))) for side in picture.size)
        left, top = (width - prepare.size) // 2, (height - prepare.size) // 2
        way = Image.Resampling.BICUBIC if prepare.cubic else Image.Resampling.BILINEAR
        picture = picture.resize((width, height), way)
        picture = picture.crop((left, top, left + prepare.size, top + prepare.size))
    array = np.asarray(picture, dtype=np.float32) / 255
    planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return _normalised(torch.from_numpy(np.ascontiguousarray(planes)), prepare)


def _normalised(image: Tensor, prepare: Preprocessing) -> Tensor:
    for name, values in (("mean", prepare.mean), ("std", prepare.std)):
        if values is not None and len(values) not in (1, image.shape[0]):
            raise ConfigError(
                f"--{name} has {len(values)} values, but the pictures {image.shape[0]} channels; give 1 or as many"
            )
    if prepare.mean is not None:
        image = image - torch.tensor(prepare.mean, dtype=image.dtype)[:, None, None]
    if prepare.std is not None:
        image = image / torch.tensor(prepare.std, dtype=image.dtype)[:, None, None]
    return image
