"""The defence set: a loader read once into memory, checked, split and batched; and the check of a model against it."""

from __future__ import annotations

import contextlib
import copy
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mnp_fast.errors import ConfigError, DataError, MnpFastError, ModelError
from mnp_fast.sites import undisturbed

# Below this the held-back part has a handful of pictures, and an accuracy measured on it says nothing.
MIN_PICTURES = 20
_KEYS = (("pixel_values", "images", "image"), ("labels", "label"))
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, eq=False)
class DefenceSet:
    """Clean pictures and their labels.

    images: (n, ...) floating, finite, on any device. labels: (n,) int64, at least 0, on the CPU.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def in_float32(self) -> DefenceSet:
        """The same with images in float32."""
        return DefenceSet(self.images.to(torch.float32), self.labels)

    def on(self, device: torch.device) -> DefenceSet:
        """The same with the images on ``device``: moved once, not with every batch."""
        return DefenceSet(self.images.to(device), self.labels)

    def subset(self, index: Tensor | Sequence[int]) -> DefenceSet:
        """The pictures at `index` (integers or a mask of n booleans), in that order, copied."""
        where = torch.as_tensor(index)
        if where.dtype != torch.bool:
            where = where.long()
        return DefenceSet(self.images[where], self.labels[where])

    def deviation(self) -> Tensor:
        """(n, ...): the pictures less the mean of each channel over all of them."""
        return self.images - self.images.mean([0, *range(2, self.images.dim())], keepdim=True)

    def split(self, held_back: float, generator: torch.Generator) -> tuple[DefenceSet, DefenceSet]:
        """Split into (learning, held back), stratified by label; the same seed gives the same split.

        Every class keeps at least one learning picture, and at least one picture is held back. Where classes have so
        few pictures that this would hold back less than half of what was asked (one picture a class, say), the
        held-back pictures are drawn without regard to class instead.
        held_back: share in (0, 1), else ConfigError. DataError where there are fewer than two pictures.
        """
        if not 0.0 < held_back < 1.0:
            raise ConfigError(f"the held-back share is {held_back}; it must lie between 0 and 1, both excluded")
        n = len(self)
        if n < 2:
            raise DataError(f"a set of {n} picture(s) cannot be split into a learning and a held-back part; give more")
        wanted = min(max(1, round(held_back * n)), n - 1)
        shuffled = torch.randperm(n, generator=generator)
        counts = torch.bincount(self.labels)
        spare = (counts - 1).clamp_min(0)
        if 2 * int(spare.sum()) < wanted:
            held = shuffled[:wanted]
        else:
            labels = self.labels[shuffled]
            places = torch.full_like(counts, n).scatter_reduce_(0, labels, torch.arange(n), "amin")
            quota = _quota(counts, spare, wanted, places)
            held = torch.cat([shuffled[labels == c][: int(quota[c])] for c in quota.nonzero().flatten().tolist()])
        is_held = torch.zeros(n, dtype=torch.bool)
        is_held[held] = True
        return self.subset(~is_held), self.subset(is_held)

    def dealt(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Ascending indices of so many disjoint parts of nearly equal sizes, stratified by label; all pictures once."""
        shuffled = torch.randperm(len(self), generator=generator)
        by_label = shuffled[self.labels[shuffled].argsort(stable=True)]
        return [by_label[first::count].sort().values for first in range(count)]

    def joined(self, other: DefenceSet) -> DefenceSet:
        """These pictures and then those of ``other``."""
        return DefenceSet(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of `batch_size` pictures, on `device`; shuffled where a (CPU) generator is given.

        No last picture is left alone, since batch statistics need two: it joins the batch before it. Otherwise the last
        may be smaller. Shuffled batches are never of less than two pictures, unshuffled ones of one where asked for.
        """
        if batch_size < 1:
            raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
        n = len(self)
        order = None if generator is None else torch.randperm(n, generator=generator)
        step = batch_size if order is None else max(2, batch_size)
        starts = list(range(0, n, step))
        if step > 1 and len(starts) > 1 and n - starts[-1] == 1:
            starts.pop()
        for start, stop in zip(starts, [*starts[1:], n], strict=True):
            index = slice(start, stop) if order is None else order[start:stop]
            images, labels = self.images[index], self.labels[index]
            # A slice would be the pictures themselves, which a forward may normalise in place.
            yield (images.clone() if order is None else images).to(device), labels.to(device)


def collect(
    loader: Any, *, seed: int = 0, what: str = "loader", min_pictures: int = MIN_PICTURES, min_classes: int = 2
) -> DefenceSet:
    """Read `loader` once into a DefenceSet, and check it.

    loader: re-iterable of batches, each a pair (images, labels) or a mapping with pixel_values|images|image and
    labels|label. images: (b, ...) floating; half precision becomes float32, the rest is kept. labels: (b,) integer.
    The global random states are seeded with `seed` for the reading and put back afterwards, and so is the loader's own
    generator: a shuffling loader gives the same order for the same seed.
    what: the loader's name in messages. DataError, naming cause and remedy, for anything that cannot be used.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    limit, used = _memory_limit(), 0
    with _seeded(seed, loader):
        for number, batch in enumerate(_iterate(loader, what)):
            where = f"batch {number} of the {what}"
            x, y = _pair(batch, where)
            x, y = _checked_images(x, where), _checked_labels(y, where)
            if len(x) != len(y):
                raise DataError(f"{where} has {len(x)} images but {len(y)} labels; each image needs exactly one label")
            if images and x.shape[1:] != images[0].shape[1:]:
                raise DataError(
                    f"{where} has images of shape {tuple(x.shape[1:])}, the batches before it "
                    f"{tuple(images[0].shape[1:])}; resize or crop all images to one shape"
                )
            if len(x) == 0:
                continue
            used += x.nbytes
            if used > limit:
                raise DataError(
                    f"the {what} gives more than {limit / 2**30:.1f} GiB of images, a quarter of the memory here, or "
                    "never ends; a few hundred to a few thousand pictures are enough (torch.utils.data.Subset)"
                )
            # Cloned: some loaders hand out the same buffer for every batch.
            images.append(x.clone())
            labels.append(y.clone())
    if not images:
        raise DataError(f"the {what} is empty: it gave no picture; give it clean pictures, a few hundred or more")
    data = DefenceSet(torch.cat(images), torch.cat(labels))
    if len(data) < min_pictures:
        raise DataError(
            f"the {what} gave only {len(data)} pictures; at least {min_pictures} are needed, better a few hundred"
        )
    classes = data.labels.unique()
    if len(classes) < min_classes:
        raise DataError(
            f"all pictures of the {what} have label {int(classes[0])}; at least {min_classes} classes are needed: "
            "give pictures of every class, and check that the labels are read rightly"
        )
    return data


def check_model(model: nn.Module, data: DefenceSet) -> int:
    """Number of classes of `model`, after checking that it can be repaired with `data`. The model is not changed.

    A copy runs a few pictures in evaluation mode, on the model's own device.
    ModelError: weights or buffers with NaN or Inf, an output that is not logits (b, classes >= 2) or not finite, a
    forward that runs the original whatever copy it is called on.
    DataError: the model cannot take the images, or a label is not one of its classes.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}, not a torch.nn.Module; give the network itself")
    _check_weights(model)
    _check_hooks(model)
    images = data.images[:8]
    own: Tensor | None = floating_parameter(model)
    own = torch.empty(0) if own is None else own
    try:
        trial = copy.deepcopy(model).eval()
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied ({_brief(error)}); remove hooks or attributes that copy.deepcopy cannot take"
        ) from error
    run: set[int] = set()
    noting = register_module_forward_pre_hook(lambda module, _: run.add(id(module)))
    try:
        # The original's flags and buffers too, for a forward that runs it in place of its copy.
        with undisturbed(model), torch.random.fork_rng(devices=[]), torch.no_grad():
            output = trial(images.to(own.device, own.dtype, copy=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"the model cannot take the loader's images, shape {tuple(images.shape[1:])} and {images.dtype} "
            f"({_brief(error)}); give images as in training, and a model that runs on one device in their dtype"
        ) from error
    finally:
        noting.remove()
    bound = [path or "the model itself" for path, module in model.named_modules() if id(module) in run]
    if bound:
        raise ModelError(
            f"a copy of the model runs the original ({', '.join(bound[:3])}), so that it cannot be repaired apart; "
            "its forward is a lambda or a bound method that was set as an attribute: define it in the class"
        )
    logits = logits_of(output)
    _check_logits(logits, len(images))
    classes = int(logits.shape[1])
    highest = int(data.labels.max())
    if highest >= classes:
        raise DataError(
            f"the labels go up to {highest}, but the model has {classes} classes (0 to {classes - 1}); "
            "number the labels as in training, or give the right model"
        )
    return classes


def floating_parameter(model: nn.Module) -> nn.Parameter | None:
    """The first floating parameter, whose device and dtype stand for the model's; None where there is none."""
    return next((tensor for tensor in model.parameters() if tensor.is_floating_point()), None)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: the tensor itself, or what stands under `logits` in an object or mapping.

    ModelError where there is none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise ModelError(
        f"the model's output is a {type(output).__name__} without logits; "
        "wrap the model in a module that returns the logits as one tensor (batch, classes)"
    )


def _quota(counts: Tensor, spare: Tensor, wanted: int, places: Tensor) -> Tensor:
    """How many pictures each class holds back: in proportion to `counts`, at most `spare`, about `wanted` in all.

    Of classes that fall short alike the lowest; where some are to hold back less than one picture those that come first
    in the order of ``places``, so that it is not the lowest classes alone that are held back.
    """
    wanted = min(wanted, int(spare.sum()))
    exact = counts.double() * (wanted / int(counts.sum()))
    quota = torch.minimum(exact.floor().long(), spare)
    order = places.argsort() if bool((exact[counts > 0] < 1).any()) else torch.arange(len(counts))
    while int(quota.sum()) < wanted:
        shortfall = (exact - quota).masked_fill(quota >= spare, -torch.inf)
        quota[order[int(shortfall[order].argmax())]] += 1
    return quota


def _iterate(loader: Any, what: str) -> Iterator[Any]:
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise DataError(
            f"the {what} is a {type(loader).__name__} and cannot be iterated; "
            "give a DataLoader or a list of (images, labels)"
        ) from error
    if iterator is loader:
        raise DataError(
            f"the {what} is a one-pass {type(loader).__name__}, whose pictures would be gone after one run; "
            "give a DataLoader, or list(...) of it"
        )
    number = 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except MnpFastError:
            raise
        except Exception as error:
            raise DataError(
                f"the {what} failed on batch {number} ({_brief(error)}); "
                "mend the data set, or resize its images to one shape"
            ) from error
        yield batch
        number += 1


def _pair(batch: Any, where: str) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        first, second = (next((name for name in names if name in batch), None) for names in _KEYS)
        if first is not None and second is not None:
            return batch[first], batch[second]
        keys = ", ".join(map(str, list(batch)[:6]))
        raise DataError(f"{where} is a mapping with the keys {keys or '(none)'}; it needs 'pixel_values' and 'labels'")
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    found = f"a {type(batch).__name__}" + (f" of {len(batch)} items" if isinstance(batch, (tuple, list)) else "")
    raise DataError(f"{where} is {found}, not a pair (images, labels); let the loader give exactly these two")


def _checked_images(images: Any, where: str) -> Tensor:
    if isinstance(images, np.ndarray):
        # Turned around (BGR to RGB) or of another machine's byte order, as torch does not take them.
        images = torch.from_numpy(np.ascontiguousarray(images, images.dtype.newbyteorder("=")))
    if not isinstance(images, Tensor):
        raise DataError(f"the images of {where} are a {type(images).__name__}; they must be one tensor (batch, ...)")
    if images.ndim < 2:
        raise DataError(f"the images of {where} have shape {tuple(images.shape)}; they must be a batch (batch, ...)")
    if not images.is_floating_point():
        raise DataError(
            f"the images of {where} are {images.dtype}; scale and normalise them to floating point as in training"
        )
    images = images.detach().to("cpu")
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    if not bool(images.isfinite().all()):
        bad = int((~images.flatten(1).isfinite().all(dim=1)).nonzero()[0])
        raise DataError(
            f"image {bad} of {where} has NaN or Inf; remove it, or mend the normalisation (a standard deviation of 0?)"
        )
    return images


def _checked_labels(labels: Any, where: str) -> Tensor:
    try:
        labels = torch.as_tensor(labels).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the labels of {where} are a {type(labels).__name__}; they must be integers (batch,)"
        ) from error
    if labels.ndim != 1:
        remedy = (
            "wrap the data set in a DataLoader, which gives batches"
            if labels.ndim == 0
            else "give class indices (argmax of one-hot)"
        )
        raise DataError(f"the labels of {where} have shape {tuple(labels.shape)}, not (batch,); {remedy}")
    if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise DataError(f"the labels of {where} are {labels.dtype}; give class indices as integers (labels.long())")
    labels = labels.long()
    if bool((labels < 0).any()):
        raise DataError(
            f"the labels of {where} go down to {int(labels.min())}; "
            "number the classes from 0, and drop unlabelled pictures"
        )
    return labels


def _check_weights(model: nn.Module) -> None:
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if nn.parameter.is_lazy(tensor) or tensor.is_meta:
                raise ModelError(f"the {kind} {name} has no values yet; load the model's weights first")
            if tensor.is_complex() and kind == "parameter":
                raise ModelError(f"the {kind} {name} is complex; only networks of real numbers can be repaired")
            if tensor.is_floating_point() and not bool(tensor.detach().isfinite().all()):
                raise ModelError(
                    f"the {kind} {name} has NaN or Inf; the weights are damaged: load them anew from a sound file"
                )


def _check_hooks(model: nn.Module) -> None:
    """ModelError where a hook is a function that holds a part of the model: copies would read and write that one."""
    parts = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            for cell in getattr(hook, "__closure__", None) or ():
                try:
                    held = cell.cell_contents
                except ValueError:  # nothing in it yet
                    continue
                if id(held) in parts:
                    raise ModelError(
                        f"a hook on {path or 'the model itself'} is a function that holds a part of the model, so that "
                        "a copy would use the original's; make it a method of a module, or take it off"
                    )


def _check_logits(logits: Tensor, batch: int) -> None:
    if logits.ndim != 2 or logits.shape[0] != batch or not logits.is_floating_point():
        raise ModelError(
            f"the model's output for {batch} images has shape {tuple(logits.shape)} ({logits.dtype}), "
            "not (batch, classes) of logits; give an image classifier"
        )
    if logits.shape[1] < 2:
        raise ModelError(
            "the model has a single output; at least two classes are needed: give it one logit for each class"
        )
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "the model's logits have NaN or Inf on clean images; check its weights and the images' normalisation"
        )
    rounding = max(1e-4, torch.finfo(logits.dtype).eps)
    if bool((logits >= 0).all()) and bool((logits.double().sum(dim=1) - 1).abs().max() < rounding):
        raise ModelError("the model gives probabilities, not logits; remove its last softmax")


def _memory_limit() -> float:
    """A quarter of the memory of the machine or its container in bytes, or no limit where the system does not tell.

    A quarter: a run holds them up to 3.6 times: all, their two parts, a look's own part, and copies of other classes'.
    """
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            found.append(int(Path(file).read_text()))
    return min(found, default=float("inf")) / 4


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def _seeded(seed: int, loader: Any) -> Iterator[None]:
    """Seed every random state that a loader draws from in this process, and put all of them back."""
    batches = getattr(loader, "batch_sampler", None)
    parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = {id(g): g for g in (getattr(part, "generator", None) for part in parts)}
    generators = [g for g in own.values() if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed the GPUs' generators too, which are not put back here.
            for generator in (torch.default_generator, *generators):
                generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
