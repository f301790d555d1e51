"""The command mnp-fast: prune repairs the model in a weights file, scan looks for evidence of a backdoor in it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import mnp_fast
from mnp_fast import architectures, detect, io
from mnp_fast.data import DefenceSet, check_model
from mnp_fast.device import compute_device
from mnp_fast.errors import ConfigError, DataError, MnpFastError
from mnp_fast.pictures import Pictures, read_pictures
from mnp_fast.result import FILES, check_no_model

OK, USAGE, EVIDENCE, SUSPICIOUS, INTERRUPTED = 0, 2, 3, 4, 130
_ROWS_OF_SITES = 20
_EPILOG = f"""exit codes:
  0    no evidence of a backdoor, or (prune) the model was repaired
  3    evidence of a backdoor, and (prune) nothing could be pruned
  4    suspicious: less than evidence, and (prune) nothing could be pruned. A network without BatchNorm, or with fewer
       than five classes, is never more than suspicious
  2    wrong usage or bad input
  130  interrupted

A verdict is evidence, never a certificate. The architecture is {architectures.FORMS};
a factory is Python code that is run, weights are never unpickled."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (None: the process's own) and return its exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        # The report alone goes to standard output, whatever a factory or a library prints.
        with contextlib.redirect_stdout(sys.stderr):
            result, names = _run(args)
            report = {"schema_version": io.SCHEMA_VERSION, **result.report()}
    except MnpFastError as error:
        print(f"mnp-fast: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        told = "nothing was written" if args.checkpoint is None else f"the same command goes on from {args.checkpoint}"
        print(f"mnp-fast: interrupted; {told}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of classes may be of any script
    if args.json:
        print(io.to_json(report))
    elif not args.quiet:
        _show(result, names, Console(highlight=False))
        if args.out is not None:
            print(f"written to {args.out}")
    repaired = args.command == "prune" and any(result.pruned.values())
    return OK if repaired else {detect.EVIDENCE: EVIDENCE, detect.SUSPICIOUS: SUSPICIOUS}.get(result.verdict, OK)


@dataclass(frozen=True)
class _Input:
    """All that a run needs."""

    model: nn.Module
    clean: Pictures
    triggered: Pictures | None
    device: torch.device


def _run(args: argparse.Namespace) -> tuple[Any, list[str] | None]:
    """The result of the command, saved where there is an --out, and the names of the classes, where known."""
    config = _config(args.config)
    pruning = args.command == "prune"
    if args.out is not None:
        _check_out(args)
    given = _read(args)
    shared = {"device": given.device, "seed": args.seed, "progress": not args.quiet, "checkpoint": args.checkpoint}
    result: Any
    if pruning:
        result = mnp_fast.prune(given.model, given.clean, config, triggered_loader=given.triggered, **shared)
    else:
        result = mnp_fast.scan(given.model, given.clean, config, **shared)
    if given.clean.names is not None:
        result.run["class_names"] = given.clean.names
    if args.out is not None:
        result.save(args.out)
    return result, given.clean.names


def _check_out(args: argparse.Namespace) -> None:
    """ConfigError or FileError, before the long work, where --out would write over what is given or cannot be used."""
    io.check_writable(args.out)
    inputs = [path.resolve() for path in (args.weights, args.data, args.triggered) if path is not None]
    lost = [name for name in FILES if (args.out / name).resolve() in inputs]
    if lost:
        raise ConfigError(f"--out {args.out} would write over {lost[0]}, which is an input; name another directory")
    if args.command == "scan":
        check_no_model(args.out)


def _read(args: argparse.Namespace) -> _Input:
    device = compute_device(_best_device() if args.device is None else args.device)
    weights = io.read_weights(args.weights)
    model = architectures.build_with_weights(args.arch, weights, args.classes)
    given = {name: value for name in ("size", "mean", "std") if (value := getattr(args, name)) is not None}
    if args.size is not None:
        given["margin"] = 1.0  # the user's size is the whole of it
    prepare = dataclasses.replace(architectures.preprocessing(args.arch, model), **given)
    # Floating arrays may be normalised already, so the network's usual preprocessing is not for them.
    floating = architectures.Preprocessing(**given)

    def pictures(path: Path) -> Pictures:
        found = read_pictures(path, prepare, args.batch_size, floating)
        _check_folder(found, model, path)
        return found if args.limit is None else found.limited(args.limit, args.seed)

    triggered = None
    if args.triggered is None and args.target is not None:
        raise ConfigError("--target says what --triggered pictures aim at; give --triggered too, or neither")
    if args.triggered is not None:
        triggered = pictures(args.triggered)
        if args.target is not None:
            triggered = triggered.aimed_at(args.target)
    return _Input(model, pictures(args.data), triggered, device)


def _check_folder(found: Pictures, model: nn.Module, path: Path) -> None:
    """DataError where a folder lacks classes: the places of the others would have moved, and their labels be wrong."""
    if found.names is None:
        return
    classes = check_model(model, DefenceSet(*next(iter(dataclasses.replace(found, batch_size=1)))))
    if len(found.names) != classes:
        raise DataError(
            f"{path} has {len(found.names)} subfolders, but the model has {classes} classes; "
            "make one for every class, an empty one for a class without pictures"
        )


def _config(pairs: Sequence[str]) -> Any:
    known = {field.name for field in dataclasses.fields(mnp_fast.PruneConfig)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--config {pair} has no value; give it as name=value")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the names are {', '.join(sorted(known))}"
            raise ConfigError(f"--config {name} is unknown; {hint}")
        values[name] = _value(text)
    try:
        return mnp_fast.PruneConfig(**values)
    except TypeError as error:
        raise ConfigError(f"--config {' '.join(pairs)} cannot be used ({error})") from error


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mnp-fast", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prune|scan")
    prune = commands.add_parser("prune", help="repair a model", epilog=_EPILOG, formatter_class=parser.formatter_class)
    scan = commands.add_parser(
        "scan", help="look for a backdoor without repairing", epilog=_EPILOG, formatter_class=parser.formatter_class
    )
    for command in (prune, scan):
        _add_common(command)
    scan.set_defaults(triggered=None, target=None)
    prune.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory for the repaired model, its masks and the report",
    )
    scan.add_argument("--out", type=Path, metavar="DIR", help="directory for a report (default: none is written)")
    prune.add_argument(
        "--triggered",
        type=Path,
        metavar="DIR|FILE",
        help="pictures with the trigger, only to measure the attack before and after; labelled with the attacker's "
        "target, or with their true classes where --target is given",
    )
    prune.add_argument("--target", type=int, metavar="N", help="the attacker's target class, for --triggered")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", required=True, help=architectures.FORMS)
    add(
        "--weights",
        required=True,
        type=Path,
        metavar="FILE",
        help=".safetensors, or a .pth, .pt or .bin of tensors only",
    )
    add(
        "--data",
        required=True,
        type=Path,
        metavar="DIR|FILE",
        help="clean pictures, a few hundred or more: a folder with one subfolder a class, numbered in the order of "
        "their sorted names ('10' before '2', as torchvision's ImageFolder does); or an .npz with arrays x and y",
    )
    add("--classes", type=int, metavar="N", help="number of classes (default: as in the weights)")
    add("--limit", type=int, metavar="N", help="use at most N pictures, shared among the classes (default: all)")
    add(
        "--size",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side, crop the centre (default: the network's own)",
    )
    for name, what in (("mean", "subtracted from"), ("std", "divides")):
        add(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{what} pictures in [0, 1], one value or one a channel "
            "(default: the network's own, none for floating arrays and factories)",
        )
    add("--config", action="append", default=[], metavar="NAME=VALUE", help="a field of PruneConfig; may be repeated")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="the same seed gives the same result (default: 0)")
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="keep every stage there as it ends: the same command goes on after the last one if it was interrupted, "
        "prune after scan, and prune with other settings of the repair after the evidence; may be deleted afterwards "
        "(default: none)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="pictures read at a time (default: 64)")
    add("--json", action="store_true", help="print the report, one JSON object, and nothing else to standard output")
    add("--quiet", action="store_true", help="print only errors (and, with --json, the report)")


def _show(result: Any, names: list[str] | None, console: Console) -> None:
    target = result.suspected_target
    named = ""
    if names is not None and target is not None and target < len(names):
        named = f" ({escape(names[target])})"
    facts = Table("", "", show_header=False, box=None)
    facts.add_row("verdict", result.verdict)
    facts.add_row("suspected target", "none" if target is None else f"{target}{named}")
    looks = len(result.evidence["looks"])
    facts.add_row("score", f"{result.evidence['score']:.2f} ({looks} look{'s' if looks > 1 else ''})")
    if "accuracy" in result.run:
        facts.add_row("accuracy on the pictures", f"{result.run['accuracy']:.4g}")
    for name, value in getattr(result, "metrics", {}).items():
        if value is None or isinstance(value, (int, float, str)):
            facts.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    pruned = {site: neurons for site, neurons in getattr(result, "pruned", {}).items() if len(neurons)}
    if hasattr(result, "pruned"):
        facts.add_row("repair strength", f"{result.run['repair_strength']:.2f}")
        facts.add_row("neurons pruned", f"{sum(map(len, pruned.values()))} of {sum(map(len, result.masks.values()))}")
    console.print(facts)
    if pruned:
        sites = Table("site", "pruned", "neurons")
        for site, neurons in list(pruned.items())[:_ROWS_OF_SITES]:
            sites.add_row(escape(site), str(len(neurons)), str(len(result.masks[site])))
        if len(pruned) > _ROWS_OF_SITES:
            sites.add_row(f"and {len(pruned) - _ROWS_OF_SITES} more", "", "")
        console.print(sites)
    stages = Table("stage", "seconds", "loss", "accuracy")
    for entry in result.history:
        cells = [entry.get(key) for key in ("seconds", "loss", "accuracy")]
        stages.add_row(str(entry.get("stage")), *("" if cell is None else f"{cell:.3g}" for cell in cells))
    console.print(stages)


if __name__ == "__main__":
    sys.exit(main())
