"""Repair networks with each defence and measure ACC, ASR and DER on test pictures.

python -m benchmarks.defense run (--models DIR --data NAME=FILE ... | --zoo DIR) --json FILE [--methods mnp anp ...]

The defence gets clean training pictures, drawn by the seed; triggers and test pictures only measure. A row of FILE is
one repair; what is there already is skipped, and several processes may write the same FILE.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks import results_file
from benchmarks.defense import case as cases
from benchmarks.defense import pictures, zoo
from benchmarks.defense.baselines import ABLATIONS, METHODS
from benchmarks.defense.baselines.common import Repair
from benchmarks.defense.case import Case
from benchmarks.environment import environment
from benchmarks.options import device_of
from mnp_fast import MnpFastError, PruneConfig
from mnp_fast.data import DefenceSet
from mnp_fast.masked import prune_
from mnp_fast.sites import find_sites, total_neurons

Row = dict[str, Any]

SHIFTS = ("none", "brightness", "crop", "jpeg")
BRIGHTER, CROPPED, QUALITY = 1.2, 28 / 32, 50
ORACLE_COUNTS = 20


class Job(NamedTuple):
    """What tells rows apart; all of it is in the row."""

    case: str
    pictures: int
    seed: int
    method: str
    shift: str
    config: str
    test: int


class Source(Protocol):
    """Networks and the pictures they were trained on."""

    def names(self) -> list[str]: ...

    def case(self, name: str) -> Case: ...

    def twin(self, case: Case) -> nn.Module | None:
        """A clean network of the same architecture, pictures and seed, if there is one."""

    def pictures(self, data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Folder:
    """The networks that the command train wrote, and files of pictures by name."""

    folder: Path
    data: Mapping[str, str]

    def names(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.safetensors"))

    def case(self, name: str) -> Case:
        return cases.load(self.folder / f"{name}.safetensors")

    def twin(self, case: Case) -> nn.Module | None:
        name = case.name.replace(f"{case.network}-{case.attack}-", f"{case.network}-{cases.CLEAN}-", 1)
        return self.case(name).model if name in self.names() else None

    def pictures(self, data: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if data not in self.data:
            raise SystemExit(f"there are no pictures named {data}: give --data {data}=FILE")
        return _load_pictures(self.data[data])


@cache
def _load_pictures(source: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train_images, train_labels, test_images, test_labels = pictures.load(source)
    return train_images, train_labels, test_images, test_labels


# ---------------------------------------------------------------- command
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--models", type=Path, metavar="DIR", help="networks that the command train wrote")
    source.add_argument("--zoo", type=Path, metavar="DIR", help="a folder with zoo.py")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FILE", help="pictures of --models")
    parser.add_argument("--cases", nargs="+", help="default: all")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=(*METHODS, *ABLATIONS),
        default=list(METHODS),
        help="default: all but " + " and ".join(ABLATIONS),
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", nargs="+", type=int, default=[500], help="of the defence set (default: 500)")
    parser.add_argument("--shift", choices=SHIFTS, default="none", help="change of the defence pictures")
    parser.add_argument("--test", type=int, default=2000, help="test pictures (default: 2000)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--oracle", action="store_true", help="measure the count that the test pictures would pick too")
    parser.add_argument("--config", nargs="+", default=[], metavar="FIELD=VALUE", help="other than the defaults")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="rows are added to FILE")
    parser.add_argument("--again", action="store_true", help="measure what FILE has already, too")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the work, from 1")


def main(args: argparse.Namespace) -> None:
    """Run what is missing. SystemExit where a defence refused a network, after all others have run."""
    device = device_of(args)
    source: Source = zoo.read(args.zoo) if args.zoo else Folder(args.models, dict(_pairs(args.data)))
    names = source.names()
    if not names:
        raise SystemExit(f"{args.zoo or args.models} has no networks: name a folder that the command train wrote")
    if unknown := sorted(set(args.cases or ()) - set(names)):
        raise SystemExit(f"there are no cases {', '.join(unknown)}; there are {', '.join(names) or 'none at all'}")
    overrides = config_overrides(args.config)
    settings = (args.shift, json.dumps(overrides, sort_keys=True), args.test)
    todo = [Job(*job, *settings) for job in product(args.cases or names, args.pictures, args.seeds, args.methods)]
    refused = []
    name, case, twin = "", None, None
    for job in shard(todo, args.shard):
        if not args.again and job in done(args.json):
            continue
        if case is None or job.case != name:
            name, case = job.case, source.case(job.case)
            twin = source.twin(case)
            for model in filter(None, (case.model, twin)):
                model.to(device)
        try:
            row = measure(case, source.pictures(case.data), job, PruneConfig(**overrides), twin, oracle=args.oracle)
        except MnpFastError as error:
            refused.append(f"{job.case}, {job.method}, seed {job.seed}: {error}")
            print(refused[-1], file=sys.stderr, flush=True)
            continue
        print(json.dumps(row), flush=True)
        append(args.json, row, args.device)
    if refused:
        raise SystemExit(f"{len(refused)} repairs failed and have no row")


def config_overrides(given: Sequence[str]) -> dict[str, Any]:
    """{field: value} of FIELD=VALUE. SystemExit for what `PruneConfig` does not take."""
    types = {"int": int, "float": float, "str": str}
    known = {field.name: types[str(field.type)] for field in fields(PruneConfig)}
    try:
        found = {name: known[name](value) for name, value in _pairs(given)}
        PruneConfig(**found)
    except KeyError as error:
        raise SystemExit(f"--config: there is no setting {error}; there are {', '.join(known)}") from error
    except (ValueError, MnpFastError) as error:
        raise SystemExit(f"--config: {error}") from error
    return found


def shard(jobs: Sequence[Job], part: str) -> list[Job]:
    """Every N-th job from the I-th, for a part "I/N"."""
    number, _, of = part.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise SystemExit(f"--shard {part}: give I/N with I from 1 to N, as in 1/2")
    return list(jobs[int(number) - 1 :: int(of)])


def _pairs(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"{pair}: give NAME=VALUE")
        yield name, value


# ---------------------------------------------------------------- one row
def measure(
    case: Case,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    job: Job,
    config: PruneConfig,
    twin: nn.Module | None = None,
    *,
    oracle: bool,
) -> Row:
    """One repair: what it found, and how the network does on test pictures before and after, all where the network is.

    twin: a clean network there too, whose ASR (asr_clean) says what the trigger does where there is no backdoor.
    """
    train_images, train_labels, test_images, test_labels = data
    device = next(case.model.parameters()).device
    pick = drawn(len(train_labels), job.pictures, 1000 + job.seed)
    clean = shifted(train_images[pick], job.shift)
    defence = DefenceSet(case.preprocess(clean.to(device).float() / 255), train_labels[pick])
    part = drawn(len(test_labels), job.test, 0)
    test = (test_images[part].to(device), test_labels[part].to(device))
    repair = (METHODS | ABLATIONS)[job.method](case.model, defence, job.seed, config)
    before, after = (cases.measure(case, model, *test) for model in (case.model, repair.model))
    row: Row = job._asdict() | {"config": json.loads(job.config)}
    row |= {"attack": case.attack, "network": case.network, "data": case.data}
    for when, found in (("before", before), ("after", after)):
        row |= {f"{name}_{when}": value for name, value in zip(("acc", "asr", "racc"), found, strict=True)}
    row["asr_clean"] = None if twin is None else cases.measure(case, twin, *test)[1]
    row["der"] = der(before, after)
    row |= _oracle(case, repair, before, test) if oracle and repair.order is not None else {}
    row |= {"verdict": repair.verdict, "suspected_target": repair.suspected_target, "target": case.target}
    row |= {"evidence": repair.evidence, "pruned": repair.pruned, "neurons": repair.neurons}
    row |= {"seconds": round(repair.seconds, 2), "peak_mb": round(repair.peak_mb)}
    row["stages"] = {name: round(seconds, 2) for name, seconds in repair.stages.items()}
    return row


Measured = tuple[float, float | None, float | None]


def der(before: Measured, after: Measured) -> float | None:
    """(max(0, ASR drop) - max(0, ACC drop) + 1) / 2; None where there is no attack."""
    if before[1] is None or after[1] is None:
        return None
    return (max(0.0, before[1] - after[1]) - max(0.0, before[0] - after[0]) + 1) / 2


def drawn(total: int, count: int, seed: int) -> Tensor:
    """The first ``count`` of a permutation, ascending: the same for every method, and nested for growing counts."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(total)[:count]))


def shifted(images: Tensor, shift: str) -> Tensor:
    """Defence pictures that are not quite like the training pictures; uint8 (n, 3, h, w), the same in ``images``."""
    if shift == "brightness":
        return (images.float() * BRIGHTER).round().clamp(0, 255).to(torch.uint8)
    if shift == "crop":
        height, width = images.shape[2:]
        kept = [round(CROPPED * size) for size in (height, width)]
        top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
        inner = images[:, :, top : top + kept[0], left : left + kept[1]].float()
        resized = F.interpolate(inner, size=(height, width), mode="bilinear", antialias=True)
        return resized.round().clamp(0, 255).to(torch.uint8)
    if shift == "jpeg":
        return torch.stack([_jpeg(image) for image in images])
    return images


def _jpeg(image: Tensor) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=QUALITY)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).contiguous()


def _oracle(case: Case, repair: Repair, before: Measured, test: tuple[Tensor, Tensor]) -> Row:
    """The count along the order with the best DER on the test pictures, of pruning alone. No choice rests on it."""
    assert repair.order is not None
    plain = copy.deepcopy(case.model).eval()
    sites = find_sites(plain, case.preprocess(test[0][:2].float() / 255))
    if len(repair.order) != total_neurons(sites):
        return {}  # Fine-Pruning: an order of the classifier's inputs alone
    best: tuple[float, int, Measured] | None = None
    for count in oracle_counts(len(repair.order), repair.pruned):
        keep = torch.ones(total_neurons(sites), dtype=torch.bool)
        keep[repair.order[:count]] = False
        pruned = copy.deepcopy(plain)
        prune_(pruned, sites, keep)
        found = cases.measure(case, pruned, *test)
        value = der(before, found)
        if value is not None and (best is None or value > best[0]):
            best = (value, count, found)
    if best is None:
        return {}
    value, count, (accuracy, asr, _) = best
    return {"oracle_der": value, "oracle_pruned": count, "oracle_acc": accuracy, "oracle_asr": asr}


def oracle_counts(last: int, own: int) -> list[int]:
    """About `ORACLE_COUNTS` counts from 0 to half of ``last``, denser at the start, and the method's own."""
    grid = np.geomspace(1, max(1, last // 2), ORACLE_COUNTS - 2).round().astype(int)
    return sorted({0, min(own, last), *grid.tolist()})


# ---------------------------------------------------------------- the file
def done(file: Path) -> set[Job]:
    """What has a row already."""
    return {key(row) for row in results_file.load(file)["rows"]} if file.exists() else set()


def key(row: Row) -> Job:
    """The job that a row is of."""
    return Job(**{name: row[name] for name in Job._fields} | {"config": json.dumps(row["config"], sort_keys=True)})


def append(file: Path, row: Row, device: str = "cpu") -> None:
    """Add a row in place of one of the same job; whole or not at all, also where other processes add theirs."""
    with _alone(file):
        results_file.save(file, "defense", environment(device), [row])


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a crash
        yield
