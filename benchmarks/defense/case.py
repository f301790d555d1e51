"""One network to repair: its weights, what it takes, and the trigger that it answers to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.defense import networks
from benchmarks.defense.attacks import Attack, make

CLEAN = "clean"
KEY = "case"
BATCH = 250


@dataclass(frozen=True)
class Case:
    """A network with the attack that was made on it. Pictures are float32 (b, 3, h, w) in [0, 1].

    model: in eval mode, logits (b, classes). data: name of the pictures that it was trained on. attack: "clean" where
    there is none. preprocess: pictures to the network's input. trigger: pictures to pictures with the trigger, in
    steps of 1/255; None for a clean network. attacked_labels: true labels (b,) to what the attacker wants, for a clean
    network the labels themselves. target: None for a clean network and for all-to-all.
    """

    name: str
    model: nn.Module
    data: str
    attack: str
    network: str
    preprocess: Callable[[Tensor], Tensor]
    trigger: Callable[[Tensor], Tensor] | None
    attacked_labels: Callable[[Tensor], Tensor]
    target: int | None


@dataclass(frozen=True)
class Normalise:
    """(pictures - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        # Made on the CPU, so that a GPU need not wait.
        mean, std = (values.to(images.device, non_blocking=True) for values in (mean, std))
        return (images - mean) / std


def case_name(network: str, attack: str, data: str, seed: int) -> str:
    """Of a case, and of its file without the suffix."""
    return f"{network}-{attack}-{data}-{seed}"


def save(folder: Path, model: nn.Module, attack: Attack | None, info: Mapping[str, Any]) -> Path:
    """Write FOLDER/<info["name"]>.safetensors, whole or not at all, and return it.

    info: JSON values: name, network, data, attack, classes, mean and std, and whatever else is to be known of the
    training (acc, asr, seed, epochs). The attack's parameters are added.
    """
    content = dict(info) | {"parameters": {} if attack is None else asdict(attack)}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"trigger.{name}": value for name, value in (attack.state() if attack else {}).items()}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{info['name']}.safetensors"
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        save_file(plain, temporary, {KEY: json.dumps(content)})
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def read_info(file: Path) -> dict[str, Any]:
    """What `save` wrote beside the tensors. SystemExit where the file is none of `save`'s."""
    try:
        with safe_open(file, "pt") as content:
            info: dict[str, Any] = json.loads((content.metadata() or {})[KEY])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise SystemExit(f"{file} is no case of this benchmark ({error!r}); make one with its command train") from error
    return info


def load(file: Path) -> Case:
    """The case in a file that `save` wrote, on the CPU in float32. SystemExit where the file is none of those."""
    info = read_info(file)
    with safe_open(file, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    model = networks.build(info["network"], info["classes"])
    model.load_state_dict(_under("model.", tensors))
    attack = None
    if info["attack"] != CLEAN:
        attack = make(info["attack"], **info["parameters"])
        attack.restore(_under("trigger.", tensors))
    return bind(model, attack, info)


def bind(model: nn.Module, attack: Attack | None, info: Mapping[str, Any]) -> Case:
    """A network and its attack as a case; `info` as for `save`."""
    return Case(
        name=info["name"],
        model=model.eval(),
        data=info["data"],
        attack=info["attack"],
        network=info["network"],
        preprocess=Normalise(tuple(info["mean"]), tuple(info["std"])),
        trigger=None if attack is None else attack.apply,
        attacked_labels=_unchanged if attack is None else attack.attacked_labels,
        target=None if attack is None else attack.suspect,
    )


@torch.no_grad()
def measure(case: Case, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float | None, float | None]:
    """ACC, ASR and robust accuracy of `model` (the case's own or a repaired one) on test pictures.

    images: uint8 (n, 3, h, w); labels: int64 (n,); where the model is. ASR and robust accuracy are over the triggered
    pictures whose label is not what the attacker wants: the share that gets the attacker's label, and the share that
    gets its own. Both are None for a clean case.
    """
    pictures = images.float() / 255
    accuracy = _share(_predict(case, model, pictures) == labels)
    if case.trigger is None:
        return accuracy, None, None
    wanted = case.attacked_labels(labels)
    others = wanted != labels
    predicted = _predict(case, model, torch.cat([case.trigger(part) for part in pictures[others].split(BATCH)]))
    return accuracy, _share(predicted == wanted[others]), _share(predicted == labels[others])


def _predict(case: Case, model: nn.Module, pictures: Tensor) -> Tensor:
    parts: Iterable[Tensor] = pictures.split(BATCH)
    return torch.cat([model(case.preprocess(part)).argmax(1) for part in parts])


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())


def _unchanged(labels: Tensor) -> Tensor:
    return labels


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
