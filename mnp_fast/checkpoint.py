"""The stages of a run, kept on disk as they end: an interrupted run goes on after the last of them, bit for bit.

A directory holds one file a stage, with what the later stages need of it, its entry of the history, the states of the
random generators behind it, and a fingerprint of the run, by which a file of another run is refused. Settings that no
look reads (`BEYOND_LOOKS`) may differ: looks that are there are used again, the repair is computed anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnp_fast import __version__, io
from mnp_fast.config import BEYOND_LOOKS, PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.errors import ConfigError

_RANDOM = "random."
_STAGE = "stage."
_BEYOND = "settings of the repair"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_LOOK = re.compile(r"(suppress|search|weigh)(-\d+)?")
"""The stages of a look, in which nothing of `BEYOND_LOOKS` is read."""


@dataclass(frozen=True)
class StageState:
    """What the later stages need of one. tensors: on any device; those of `Checkpoint.read` on the CPU. values: JSON
    values. entry: of the history."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)


class Checkpoint:
    """The files of one run. directory: None keeps nothing. run: its `fingerprint`. generator: the run's own.

    FileError where the directory cannot be made or written to.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        run: Mapping[str, str],
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._folder = None if directory is None else Path(directory)
        self._run = dict(run)
        self._generator = generator
        self._device = device
        if self._folder is not None:
            io.check_writable(self._folder)

    def read(self, stage: str) -> StageState | None:
        """What `write` kept of the stage, the random generators being put where they were then; None where nothing is,
        or where the stage belongs to a repair with other settings.

        ConfigError where it is of another run, naming what differs. FileError where the file is damaged.
        """
        if self._folder is None or not self._file(stage).exists():
            return None
        tensors, kept = io.read_state(self._file(stage))
        differing = [name for name, value in self._run.items() if kept["run"].get(name) != value]
        if differing == [_BEYOND]:
            if not _LOOK.fullmatch(stage):
                return None
        elif differing:
            raise ConfigError(
                f"the checkpoint {self._folder} is of another run (different: {', '.join(differing)}); "
                "name an empty directory, or give what it was made with"
            )
        self._generator.set_state(tensors[_RANDOM + "own"])
        torch.set_rng_state(tensors[_RANDOM + "torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(tensors[_RANDOM + "cuda"], self._device)
        own = {name.removeprefix(_STAGE): tensor for name, tensor in tensors.items() if name.startswith(_STAGE)}
        return StageState(own, kept["values"], kept["entry"])

    def write(self, stage: str, state: StageState) -> None:
        """Keep what a stage came to, whole or not at all. FileError where it cannot be written."""
        if self._folder is None:
            return
        tensors = {_STAGE + name: tensor for name, tensor in state.tensors.items()}
        tensors |= {_RANDOM + "own": self._generator.get_state(), _RANDOM + "torch": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors[_RANDOM + "cuda"] = torch.cuda.get_rng_state(self._device)
        io.save_state(self._file(stage), tensors, {"run": self._run, "values": state.values, "entry": state.entry})

    def _file(self, stage: str) -> Path:
        assert self._folder is not None
        return self._folder / f"stage-{stage}.safetensors"  # no name of a result, which may stand in the same folder


def fingerprint(
    model: nn.Module, data: DefenceSet, config: PruneConfig, seed: int, device: torch.device, products: str
) -> dict[str, str]:
    """What a run depends on, by name: hashes of weights and pictures, settings, versions."""
    settings = asdict(config)
    others = {name: settings.pop(name) for name in sorted(BEYOND_LOOKS)}
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        # Strides and activations too, but no addresses, which differ from process to process.
        "layers": hashlib.sha256(_ADDRESS.sub("", repr(model)).encode()).hexdigest(),
        "weights": _hash(io.model_tensors(model)),
        "pictures": _hash({"images": data.images, "labels": data.labels}),
        "config": io.to_json(settings, indent=None),
        _BEYOND: io.to_json(others, indent=None),
        "seed": str(seed),
        "device": device.type,
        "products": products,
        "mnp_fast": f"{__version__} {_SOURCES}",
        "torch": torch.__version__,
    }


def _sources() -> str:
    """A hash of the package's own files: what a stage computes changes more often than the version."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".so") and not file.name.startswith(".") and file.is_file():
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


@torch.no_grad()
def restore_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model tensors that `io.model_tensors` took from one like it; in place."""
    for name, own in io.model_tensors(model).items():
        own.copy_(tensors[name])


_SOURCES = _sources()
"""As they were imported: they may change while a process runs."""


def _hash(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
