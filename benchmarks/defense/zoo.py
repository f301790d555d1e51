"""Cases from a module of backdoored networks: a folder with zoo.py.

zoo.py has CASES, load(name) -> case (model, dataset, preprocess, trigger, target) whose preprocess and trigger take
uint8 NHWC arrays, and images(dataset, split) -> (uint8 NHWC pictures, labels) for "train" and "test".
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.defense.case import CLEAN, Case


@dataclass(frozen=True)
class Zoo:
    """The networks and pictures of a zoo module, in the form of this benchmark."""

    module: Any

    def names(self) -> list[str]:
        return list(self.module.CASES)

    def case(self, name: str) -> Case:
        """Attack and network are read from a name like network_data_attack or clean_data_network."""
        found = self.module.load(name)
        first, _, last = name.partition(f"_{found.dataset}_")
        return Case(
            name=name,
            model=found.model.eval(),
            data=found.dataset,
            attack=CLEAN if found.trigger is None else last or name,
            network=last if first == CLEAN else first,
            preprocess=lambda pictures: found.preprocess(_uint8(pictures)).to(pictures.device),
            trigger=None
            if found.trigger is None
            else lambda pictures: _floats(found.trigger(_uint8(pictures))).to(pictures.device),
            attacked_labels=_towards(found.target),
            target=found.target,
        )

    def twin(self, case: Case) -> None:
        """None: networks of a zoo were not trained alike."""

    def pictures(self, data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(train images, train labels, test images, test labels); images uint8 (n, 3, h, w), labels int64."""
        return _pictures(self.module, data)


def read(folder: Path) -> Zoo:
    """The zoo of a folder. SystemExit where there is no zoo.py."""
    file = folder / "zoo.py"
    spec = importlib.util.spec_from_file_location("zoo", file)
    if spec is None or spec.loader is None or not file.exists():
        raise SystemExit(f"there is no {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return Zoo(module)


@cache
def _pictures(module: Any, data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts: list[Tensor] = []
    for split in ("train", "test"):
        images, labels = module.images(data, split)
        parts += [torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels).long()]
    return parts[0], parts[1], parts[2], parts[3]


def _towards(target: int | None) -> Callable[[Tensor], Tensor]:
    return lambda labels: labels if target is None else torch.full_like(labels, target)


def _uint8(pictures: Tensor) -> Any:
    """[0, 1] (b, 3, h, w) as uint8 NHWC, exact for pictures in steps of 1/255."""
    return (pictures * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _floats(pictures: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
