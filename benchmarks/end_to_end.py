"""A whole run of `mnp_fast.prune`, against the same algorithm in published style and with torch.compile.

    python -m benchmarks.end_to_end [--arch resnet50] [--pictures 256] [--full] [--device cpu|cuda] [--json [FILE]]

The network is random, its last layer fitted by ridge regression on its features of the pictures, which are random and
depend on their class. mnp_fast runs whole. The others make a pass or two of real steps of every stage, whose mean is
multiplied by the number of steps that the mnp_fast run has made ("extrapolated": true); --full makes all of them. What
is not equal. In favour of the others: windows that suppression took back, the teacher's answers and preparation are in
the time of mnp_fast only. In favour of mnp_fast: its evaluations of prune sets stop once their answer is certain, those
of the others go through all pictures. torch_compile: computes in --dtype, and its total counts compiling. On CUDA
peak memory is that of the whole run; on a CPU see benchmarks.step. Compared with a reference: loss and, in float32,
gradient of the first step of mask learning; the exit status is 1 where they differ. In bfloat16 the gradient of a
random network says nothing: plain autocast is off by .4 (resnet18) to 1.2 (resnet50) on batch statistics.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mnp_fast
from benchmarks import options, results_file
from benchmarks.environment import environment
from benchmarks.models import network
from benchmarks.providers import GRADIENT_TOLERANCE, LOSS_TOLERANCE, relative_errors
from benchmarks.published import Counts, Stages, mask_objective, timed
from benchmarks.tables import console, number, ratio, table, verdict
from mnp_fast import PruneConfig
from mnp_fast.data import DefenceSet, logits_of
from mnp_fast.masked import masked
from mnp_fast.memory import kept
from mnp_fast.objectives import eliminate, preserve
from mnp_fast.optimize import recalibrate_, windows_of
from mnp_fast.sites import Site, find_sites
from mnp_fast.stats import magnitude

Row = dict[str, Any]

CLASSES = 10
STAGES = ("suppress", "search", "weigh", "perturb", "masks", "select", "fine-tune")
NAMES = ("published", "torch_compile", "mnp_fast")


def main() -> int:
    """Measure every architecture; 1 where a provider does not match."""
    parser = options.parser(__doc__, repeats=3, arch="resnet50", batch=PruneConfig.batch_size)
    options.add_threads(parser)
    parser.add_argument("--provider", action="append", choices=NAMES[:2], help="baselines (default: both)")
    parser.add_argument("--pictures", type=int, default=256, help="default: 256; a fifth is held back")
    parser.add_argument("--looks", type=int, default=PruneConfig.looks, help=f"default: {PruneConfig.looks}")
    parser.add_argument("--full", action="store_true", help="run all steps of the baselines, too")
    args = parser.parse_args()
    device = options.device_of(args)
    torch.set_num_threads(args.threads)
    out = console()
    found = []
    for arch in args.arch or ["resnet50"]:
        model, size = network(arch, args.size, CLASSES)
        data = pictures(args.pictures, size)
        fit_head_(model, *data)
        rows = []
        for row in measure(arch, model.to(device), data, args):
            rows.append(row)
            # At once: the next one may run for many minutes, or into the limits of the machine.
            if args.json:
                used = environment(args.device, [args.threads])
                out.print(f"{row['provider']} written to {results_file.save(args.json, 'end_to_end', used, [row])}")
        out.print(show(rows))
        found += rows
    return 0 if all(row["match"] for row in found) else 1


# ---------------------------------------------------------------- the input
def pictures(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(images, labels): a coarse random pattern a class, and noise on it."""
    generator = torch.Generator().manual_seed(seed)
    patterns = F.interpolate(torch.randn(CLASSES, 3, 8, 8, generator=generator), size=size, mode="bilinear")
    labels = torch.arange(count) % CLASSES
    return patterns[labels] + 0.5 * torch.randn(count, 3, size, size, generator=generator), labels


@torch.no_grad()
def fit_head_(model: nn.Module, images: Tensor, labels: Tensor, strength: float = 1e-2) -> None:
    """The last linear layer by ridge regression of one-hot labels on its inputs, centred; deterministic.

    Statistics of the pictures first: with random ones the network knew nothing under those of a batch, and there was
    nothing to suppress.
    """
    recalibrate_(model, DefenceSet(images, labels), PruneConfig(batch_size=32))
    head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES][-1]
    found: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].double()))
    for part in images.split(32):
        model(part)
    hook.remove()
    features = torch.cat(found)
    mean = features.mean(0)
    centred = features - mean
    # As many unknowns as pictures: fewer than features.
    kernel = centred @ centred.T
    kernel.diagonal().add_(strength * kernel.diagonal().mean())
    wanted = 10 * (F.one_hot(labels, CLASSES).double() - 1 / CLASSES)
    weight = torch.linalg.solve(kernel, wanted).T @ centred
    head.weight.copy_(weight)
    head.bias.copy_(-weight @ mean)


# ---------------------------------------------------------------- measuring
def measure(arch: str, model: nn.Module, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> Iterator[Row]:
    """A row a provider: mnp_fast first, since its steps say how many the others make."""
    device, dtype = next(model.parameters()).device, options.DTYPES[args.dtype]
    # Always a suspect: what a random network scores decides whether it is repaired, and the repair is to be timed.
    config = PruneConfig(
        batch_size=args.batch, precision=args.dtype, looks=args.looks, suspicion_score=0, evidence_score=0
    )
    common = {"arch": arch, "size": data[0].shape[-1], "pictures": len(data[1]), "batch": args.batch}
    common |= {"looks": args.looks, "dtype": args.dtype, "device": device.type, "threads": torch.get_num_threads()}
    start = time.perf_counter()
    loader = DataLoader(TensorDataset(*data), batch_size=64)
    result = mnp_fast.prune(model, loader, config, progress=False)
    seconds = time.perf_counter() - start
    learning, held = DefenceSet(*data).split(config.held_back, torch.Generator().manual_seed(0))
    counts = counts_of(result.history, learning, config)
    sites = find_sites(model, data[0][:2].to(device))
    ours: Row = {**common, "provider": "mnp_fast", "computes_in": args.dtype, "extrapolated": False}
    ours |= {"stages_s": {name: _seconds(result.history, name) for name in STAGES}}
    if device.type == "cuda":
        ours["peak_mb"] = round(max(entry["peak_mb"] for entry in result.history), 1)
    ours |= _total(seconds) | own_check(model, sites, learning, config)
    empty = {"peak_mb": None, "compile_s": 0.0, "steps": asdict(counts)}
    yield empty | ours
    for name in args.provider or NAMES[:2]:
        narrow = torch.float32 if name == "published" else dtype
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        stages = Stages(
            model, sites, magnitude(model, sites), learning, held, config, narrow, compiled=name == "torch_compile"
        )
        row = {**common, "provider": name, "computes_in": str(narrow).removeprefix("torch.")}
        row = empty | row | run(stages, counts, args.repeats, full=args.full)
        if device.type == "cuda":
            row["peak_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
        yield row
        # Its networks must not stand in the memory of the next.
        del stages
        gc.collect()
        torch.compiler.reset()


def run(stages: Stages, counts: Counts, sample: int, *, full: bool) -> Row:
    """What is particular to the row of one style."""
    seconds, measured, compile_s = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0), 0.0
    with kept():  # as in a run of ours: freed memory is there for the next step
        for part in stages.parts(counts):
            found = timed(part, stages.device, sample=None if full else sample, compiled=stages.compiled)
            seconds[part.stage] += found.seconds
            measured[part.stage] += found.measured
            compile_s += found.compile_s
    row: Row = {"extrapolated": not full, "measured_steps": measured}
    row |= {"stages_s": {name: round(value, 2) for name, value in seconds.items()}}
    row |= {"compile_s": round(compile_s, 2)}
    row |= _match(*stages.errors(), stages.dtype)
    return row | _total(sum(seconds.values()) + compile_s)


def own_check(model: nn.Module, sites: Sequence[Site], learning: DefenceSet, config: PruneConfig) -> Row:
    """The objective of mask learning by `masked` against the reference, the network in both roles."""
    device = next(model.parameters()).device
    images, labels = next(learning.batches(config.batch_size, device=device))
    mask = torch.ones(sum(site.neurons for site in sites), device=device, requires_grad=True)
    with masked(model, sites, mask):
        loss = eliminate(logits_of(model(images)), labels, config.alpha)
        loss = loss + preserve(logits_of(model(images)), labels, config.alpha)
    (gradient,) = torch.autograd.grad(loss, mask)
    expected = mask_objective(model, model, sites, images, labels, config.alpha, False)
    return _match(*relative_errors(float(loss.detach()), gradient, *expected), torch.float32)


# ---------------------------------------------------------------- counting
def counts_of(
    history: Sequence[Mapping[str, Any]],
    learning: DefenceSet,
    config: PruneConfig,
) -> Counts:
    """Steps of a run, from its history; those of its looks added up."""
    suppressed, searched, weighed = (entries(history, name) for name in ("suppress", "search", "weigh"))
    (masks,), (selected,) = entries(history, "masks"), entries(history, "select")
    passes_of_repair = config.finetune_epochs if entries(history, "fine-tune") else 0
    tried, perturbations = [entry["tried"] for entry in searched], [entry["perturbations"] for entry in weighed]
    # Evaluations as if of all pictures, of which a look has its share. A search is of the learning ones: for new
    # statistics, as they are, with each small perturbation in two models (those of other classes), and with waves.
    shares = [entry["pictures"] / len(learning) for entry in suppressed]
    others = 1 - 1 / len(learning.labels.unique())
    asked = sum(share * (2 + 2 * count * others) for share, count in zip(shares, tried, strict=True))
    asked += sum(entry["waved"] for entry in searched) / len(learning)
    shown = sum(share * (1 + count * others) for share, count in zip(shares, perturbations, strict=True))
    return Counts(
        suppress=sum(_steps(entry["windows"], entry["pictures"], config.batch_size) for entry in suppressed),
        search_evaluations=round(asked * (1 - config.held_back)),
        weigh_evaluations=round(shown),
        # Half of them before the model itself is asked, and then all.
        search=sum(tried) * (max(1, config.perturbation_steps // 2) + config.perturbation_steps),
        weigh=sum(perturbations) * config.perturbation_steps,
        perturb=config.perturbations * config.perturbation_steps,
        masks=masks["steps"],
        plain=1 + probes(selected["pruned"] + 1, selected["low"]),
        finetune=passes_of_repair * math.ceil(len(learning) / max(2, config.batch_size // 2)),
    )


def _steps(count: int, pictures: int, batch_size: int) -> int:
    """Of so many windows of suppression."""
    windows = windows_of(math.ceil(pictures / batch_size), batch_size)
    return sum(windows[number % len(windows)] for number in range(count))


def entries(history: Sequence[Mapping[str, Any]], stage: str) -> list[Mapping[str, Any]]:
    """Those of a stage, in a run of several looks one a look."""
    return [entry for entry in history if re.fullmatch(rf"{stage}(-\d+)?", entry["stage"])]


def probes(first: int, last: int) -> int:
    """Evaluations of a bisection over [0, last] whose answer is ``first``."""
    low, high, count = 0, last + 1, 0
    while low < high:
        middle = (low + high) // 2
        count += 1
        if middle >= first:
            high = middle
        else:
            low = middle + 1
    return count


def _seconds(history: Sequence[Mapping[str, Any]], stage: str) -> float:
    return round(sum(entry["seconds"] for entry in entries(history, stage)), 2)


def _total(seconds: float) -> Row:
    """One run: its time is the median and both percentiles."""
    return {"seconds": round(seconds, 2), "repeats": 1} | dict.fromkeys(
        ("median_ms", "p20_ms", "p80_ms"), round(seconds * 1e3)
    )


def _match(loss_error: float, gradient_error: float, dtype: torch.dtype) -> Row:
    gradient_counts = dtype == torch.float32
    return {
        "loss_error": float(f"{loss_error:.3g}"),
        "gradient_error": float(f"{gradient_error:.3g}"),
        "match": loss_error <= LOSS_TOLERANCE[dtype] and (gradient_error <= GRADIENT_TOLERANCE or not gradient_counts),
    }


def show(rows: Sequence[Row]) -> Any:
    """The rows of one architecture."""
    first = rows[0]
    by = {row["provider"]: row for row in rows}
    columns = ["provider", *(f"{name} s" for name in STAGES), "compile s", "total s", "x published", "x compile"]
    cells = [
        [
            row["provider"],
            *(number(row["stages_s"][name]) for name in STAGES),
            number(row["compile_s"]),
            number(row["seconds"]),
            ratio(by.get("published"), row, "seconds"),
            ratio(by.get("torch_compile"), row, "seconds"),
            number(row["peak_mb"]),
            "yes" if row["extrapolated"] else "no",
            verdict(row),
        ]
        for row in rows
    ]
    title = f"end to end: {first['arch']}, {first['pictures']} pictures of {first['size']}x{first['size']}"
    title += f", batch {first['batch']}, {first['dtype']}, {first['device']}, {first['threads']} threads"
    return table(title, [*columns, "peak MB", "extrapolated", "match"], cells)


if __name__ == "__main__":
    sys.exit(main())
