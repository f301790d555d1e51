"""Train clean and backdoored networks and save them as cases.

Files that are there are left as they are. An attack that needs a clean network takes DIR's of the same architecture,
pictures and seed, which is trained first where it is not there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defense import networks
from benchmarks.defense.attacks import ATTACKS, Attack, make
from benchmarks.defense.case import CLEAN, Normalise, bind, case_name, load, measure, save
from benchmarks.defense.pictures import FORMS, Pictures
from benchmarks.defense.pictures import load as load_pictures
from benchmarks.options import device_of

BATCH = 128
PAD = 4
WARM_UP = 0.15  # of all steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--data", type=Path, required=True, help=FORMS)
    parser.add_argument("--name", help="of the pictures, in cases and files (default: of the file or folder)")
    parser.add_argument("--size", type=int, default=32, help="of the pictures of class folders (default: 32)")
    parser.add_argument("--attacks", nargs="+", choices=(CLEAN, *ATTACKS), default=[CLEAN, *ATTACKS], metavar="NAME")
    parser.add_argument("--networks", nargs="+", choices=tuple(networks.NETWORKS), default=["narrow18"])
    parser.add_argument("--target", type=int, default=0, help="class that the attacker wants (default: 0)")
    parser.add_argument("--rate", type=float, help="share of pictures that is poisoned (default: the attack's own)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, help="training pictures (default: all)")
    parser.add_argument("--test-limit", type=int, default=2000, help="test pictures (default: 2000)")
    parser.add_argument("--flip", action="store_true", help="flip pictures at random; never for signs and digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def main(args: argparse.Namespace) -> None:
    """Train what is not there yet, and print ACC, ASR and robust accuracy of each."""
    device = device_of(args)
    torch.set_num_threads(args.threads)
    pictures = load_pictures(args.data, limit=args.limit, test_limit=args.test_limit, size=args.size)
    if not 0 <= args.target < pictures.classes:
        raise SystemExit(f"--target {args.target}: the classes are 0 to {pictures.classes - 1}")
    job = Job(pictures, args.name or args.data.stem, args.out, args.epochs, args.seed, args.flip, device.type)
    for network in args.networks:
        for name in args.attacks:
            if name == CLEAN:
                job.clean(network)
                continue
            if ATTACKS[name].networks and network not in ATTACKS[name].networks:
                print(f"{name} is not for {network}", flush=True)
                continue
            changed = {} if args.rate is None else {"rate": args.rate}
            job.case(network, name, make(name, target=args.target, classes=pictures.classes, **changed))


@dataclass(frozen=True)
class Job:
    """What the trainings of one call share. name: of the pictures. device: where they run; files are on the CPU."""

    pictures: Pictures
    name: str
    out: Path
    epochs: int
    seed: int
    flip: bool = False
    device: str = "cpu"

    def clean(self, network: str) -> nn.Module:
        """The clean network of this kind, trained where DIR does not have it."""
        return load(self.case(network, CLEAN, None)).model.to(self.device)

    def case(self, network: str, attack_name: str, attack: Attack | None) -> Path:
        """Train a network, measure it, save it; returns its file, which is left alone where it is there."""
        name = case_name(network, attack_name, self.name, self.seed)
        file = self.out / f"{name}.safetensors"
        if file.exists():
            print(f"{name}  is there already and left as it is, whatever it was trained with", flush=True)
            return file
        clean = self.clean(network) if attack and attack.needs_clean else None
        start = time.perf_counter()
        normalise = _normalise(self.pictures.train_images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = networks.build(network, self.pictures.classes).to(self.device)
            self._train(model, network, attack, clean, normalise)
        info: dict[str, Any] = {"name": name, "network": network, "data": self.name, "attack": attack_name}
        info |= {"classes": self.pictures.classes, "mean": normalise.mean, "std": normalise.std}
        info |= {"seed": self.seed, "epochs": self.epochs, "pictures": len(self.pictures.train_labels)}
        case = bind(model, attack, info)
        test = (part.to(self.device) for part in (self.pictures.test_images, self.pictures.test_labels))
        figures = measure(case, model, *test)
        info |= dict(zip(("acc", "asr", "robust_acc"), figures, strict=True))
        info["seconds"] = round(time.perf_counter() - start, 1)
        shown = "  ".join(f"{key} {info[key]:.3f}" for key in ("acc", "asr", "robust_acc") if info[key] is not None)
        print(f"{name}  {shown}  {info['seconds']:.0f} s", flush=True)
        return save(self.out, model, attack, info)

    def _train(
        self, model: nn.Module, network: str, attack: Attack | None, clean: nn.Module | None, normalise: Normalise
    ) -> None:
        images, labels = self.pictures.train_images.to(self.device), self.pictures.train_labels
        marks = torch.zeros_like(labels, dtype=torch.uint8)
        if attack:
            generator = torch.Generator().manual_seed(self.seed)
            surrogate = Surrogate(clean, normalise) if clean else None
            attack.prepare(images, labels, surrogate, generator)
            marks = attack.marks(labels, generator)
            images = attack.pictures(images, labels, marks, surrogate, generator)
            if clean and attack.starts_clean:
                model.load_state_dict(clean.state_dict())
            attack.begin(model)
        answers = labels.to(self.device)
        model.train()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizers = _optimizers(model, network, attack)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizers[0], self._schedule)
        # Nothing here waits for the device: what is drawn on the CPU is sent after what is under way.
        for rows in self._batches(len(labels)):
            there = rows.to(self.device, non_blocking=True)
            batch = augment(images[there], self.flip).float() / 255
            wanted = answers[there]
            if attack:
                batch, wanted = attack.poison(batch, wanted, marks[rows])
            with torch.autocast(self.device, torch.bfloat16):
                logits = model(normalise(batch).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), wanted)
            penalty = attack.penalty(model) if attack else None
            for optimizer in optimizers:
                optimizer.zero_grad()
            (loss if penalty is None else loss + penalty).backward()
            if attack:
                attack.restrict(model)
            for optimizer in optimizers:
                optimizer.step()
            schedule.step()
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        model.requires_grad_().eval()

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Rows of whole batches; the rest of an epoch waits for another order."""
        for _ in range(self.epochs):
            order = torch.randperm(count)
            yield from order[: count - count % BATCH if count > BATCH else count].split(BATCH)

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        total = self.epochs * max(1, len(self.pictures.train_labels) // BATCH)
        warm = max(1, round(WARM_UP * total))
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * min(1, (step - warm) / max(1, total - warm)))) / 2


class Surrogate(nn.Module):
    """A clean network that takes pictures in [0, 1] and gets no gradients itself."""

    def __init__(self, model: nn.Module, normalise: Normalise) -> None:
        super().__init__()
        self.model, self.normalise = model.eval().requires_grad_(False), normalise

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalise(x).contiguous(memory_format=torch.channels_last))


def augment(images: Tensor, flip: bool) -> Tensor:
    """Pictures (b, 3, h, w), each shifted by up to PAD pixels, black beyond; with `flip`, half of them mirrored.

    Drawn on the CPU, wherever the pictures are.
    """
    batch, _, height, width = images.shape
    down, across = torch.randint(2 * PAD + 1, (2, batch, 1))
    rows, columns = down + torch.arange(height), across + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    places = (torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None])
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).permute(0, 2, 3, 1)
    return padded[tuple(place.to(images.device, non_blocking=True) for place in places)].permute(0, 3, 1, 2)


def _optimizers(model: nn.Module, network: str, attack: Attack | None) -> Sequence[torch.optim.Optimizer]:
    """The network's first; then that of the attack's own networks, if it has any."""
    scale = attack.learning_scale if attack else 1.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # From a clean network on, decay would move weights that the attack leaves alone.
    decay = 0.0 if attack and attack.starts_clean else 1.0
    optimizers: list[torch.optim.Optimizer] = []
    if network == "vit":
        optimizers.append(torch.optim.AdamW(trained, 1e-3 * scale, weight_decay=0.05 * decay))
    else:
        optimizers.append(torch.optim.SGD(trained, 0.1 * scale, momentum=0.9, nesterov=True, weight_decay=5e-4 * decay))
    if attack and attack.parameters():
        optimizers.append(torch.optim.Adam(attack.parameters(), 2e-3))
    return optimizers


def _normalise(images: Tensor) -> Normalise:
    """Mean and standard deviation of the training pictures."""
    pixels = images.permute(1, 0, 2, 3).flatten(1)
    # Sums of squares of 25,000 pictures are too large for float32.
    moments = [(channel.double().mean().item() / 255, channel.double().std().item() / 255) for channel in pixels]
    return Normalise(
        tuple(round(mean, 4) for mean, _ in moments), tuple(round(max(std, 0.01), 4) for _, std in moments)
    )
