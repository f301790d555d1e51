"""Training and repairs on a GPU, where there is none: tensors say that they are on one, and are computed on the CPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks.defense import run, train
from benchmarks.defense.attacks import ATTACKS, make
from benchmarks.defense.pictures import Pictures
from benchmarks.defense.train import Job

GPU = torch.device("cuda", 0)
AUTOCAST = torch.autocast
READ = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "unique", "bincount", "equal")
MIXED = ("copy_", "__setitem__", "__getitem__", "_has_compatible_shallow_copy_type")


class Elsewhere(TorchFunctionMode):
    """Tensors sent to "cuda" say that they are there, and so do those computed from them, bit for bit as on the CPU.

    What takes tensors of both devices is an error. waits: names of the calls that a GPU would hold the host up for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name in ("__get__", "__set__"):
            return self.attribute(func, args)
        if name in ("to", "cpu"):
            return self.sent("cpu" if name == "cpu" else None, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(map(is_there, tensors))
        if there and name not in MIXED and not all(is_there(tensor) or not tensor.dim() for tensor in tensors):
            raise RuntimeError(f"{name} takes tensors of two devices")
        if there and name in ("__getitem__", "__setitem__"):
            places = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            if places and not is_there(args[0]):
                raise RuntimeError("places on the GPU of a tensor on the CPU")
            if any(place.dtype == torch.bool or not is_there(place) for place in places):
                self.waits.append(name)
        if there and name in READ:
            self.waits.append(name)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "cuda"
            if there and kwargs.get("generator") is not None:
                raise RuntimeError(f"{name} on a GPU with a generator of the CPU")
            kwargs["device"] = "cpu"
        found = func(*args, **kwargs)
        return found if any(found is tensor for tensor in tensors) else put(found, there)

    def attribute(self, func: Any, args: Any) -> Any:
        name = func.__self__.__name__
        if func.__name__ == "__set__":
            func(*args)
            put(args[0], is_there(args[1] if name == "data" else args[0]))
            return None
        if name == "device":
            return GPU if is_there(args[0]) else torch.device("cpu")
        if name in ("is_cuda", "is_cpu"):
            return is_there(args[0]) == (name == "is_cuda")
        return put(func(*args), is_there(args[0]))

    def sent(self, target: Any, tensor: Tensor, *args: Any, non_blocking: bool = False, **kwargs: Any) -> Tensor:
        """`to` and `cpu`."""
        places = [part for part in (*args, kwargs.pop("device", None)) if isinstance(part, str | torch.device)]
        there = is_there(tensor)
        for place in (*places, *filter(None, [target])):
            there = torch.device(place).type == "cuda"
        rest = [part for part in args if isinstance(part, torch.dtype)]
        if there != is_there(tensor):
            if not there or not non_blocking:
                self.waits.append("to")
            kwargs["copy"] = True
            rest = rest or [tensor.dtype]
        found = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        return tensor if found is tensor else put(found, there)


def is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "_there", False)


def put(found: Any, there: bool) -> Any:
    for leaf in tree_leaves(found):
        if isinstance(leaf, Tensor):
            leaf.__dict__["_there"] = there
    return found


def random(count: int = 40) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count + 20, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count + 20) % 3
    return Pictures(images[:count], labels[:count], images[count:], labels[count:])


def trained(name: str, out: Path, device: str) -> Path:
    """The file of a network with this attack."""
    network = ATTACKS[name].networks[0] if ATTACKS[name].networks else "vgg"
    steps = {"steps": 2} if hasattr(ATTACKS[name], "steps") else {}
    job = Job(random(), "random", out, epochs=1, seed=0, flip=True, device=device)
    return job.case(network, name, make(name, classes=3, rate=0.5, **steps))


def test_two_devices_are_refused() -> None:
    with Elsewhere() as gpu:
        there = torch.ones(2).to("cuda", non_blocking=True)
        assert (2 * there).device == GPU
        assert there.sum().cpu().device.type == "cpu"
        for mix in (
            lambda: there + torch.ones(2),
            lambda: torch.ones(2)[there.long()],
            lambda: there.mul_(torch.ones(2)),
        ):
            with pytest.raises(RuntimeError, match=r"GPU|two devices"):
                mix()
    assert gpu.waits == ["to"]


@pytest.mark.parametrize("name", ATTACKS)
def test_training_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is left behind, the file is that of the CPU, and from the second step on nothing waits."""
    monkeypatch.setattr(train, "BATCH", 16)
    expected = load_file(trained(name, tmp_path / "cpu", "cpu"))
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: AUTOCAST("cpu", dtype))
    waits: list[int] = []
    batches = Job._batches

    def watched(job: Job, count: int) -> Iterator[Tensor]:
        for rows in batches(job, count):
            yield rows
            waits.append(len(gpu.waits))

    monkeypatch.setattr(Job, "_batches", watched)
    with Elsewhere() as gpu:
        found = load_file(trained(name, tmp_path / "gpu", "cuda"))
    assert len(set(waits[-2:])) == 1
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {run: ["--models", str(tmp_path), "--json", str(tmp_path / "rows.json")]}
    given[train] = ["--data", str(tmp_path), "--out", str(tmp_path)]
    for command, options in given.items():
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        with pytest.raises(SystemExit, match="torch finds no CUDA device here"):
            command.main(parser.parse_args([*options, "--device", "cuda"]))
