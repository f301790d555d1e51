"""Options that every benchmark has, and what follows from them before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROVIDERS = ("published", "tuned_eager", "torch_compile", "mnp_fast")
"""In the order of tables and figures."""
BESIDE_OTHERS = "AUTO"
"""What --json means without a FILE."""


def parser(doc: str | None, *, repeats: int, arch: str | None = None, batch: int = 32) -> argparse.ArgumentParser:
    """The common options. arch: what is measured where --arch is not given; None for a benchmark without networks."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if arch is not None:
        options.add_argument(
            "--arch",
            action="append",
            metavar="NAME",
            help=f"resnet18, resnet50, timm/NAME, torchvision/NAME or module:factory; repeatable (default: {arch})",
        )
        options.add_argument("--size", type=int, help="height and width of pictures (default: the network's own)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--batch", type=int, default=batch, help=f"pictures a batch (default: {batch})")
    options.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="default: bfloat16")
    options.add_argument("--repeats", type=int, default=repeats, help=f"samples of each row (default: {repeats})")
    options.add_argument(
        "--json",
        nargs="?",
        type=Path,
        const=Path(BESIDE_OTHERS),
        metavar="FILE",
        help="add the rows to FILE; without FILE, to benchmarks/results/<benchmark>/<environment>.json",
    )
    return options


def add_threads(options: argparse.ArgumentParser) -> None:
    """--threads of the benchmarks that run with one number of threads."""
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")


def add_providers(options: argparse.ArgumentParser) -> None:
    """--provider, to measure some of the four."""
    options.add_argument(
        "--provider", action="append", choices=PROVIDERS, help="repeatable (default: all; torch_compile takes longest)"
    )


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that was asked for, or an end with a message where it is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here")
    return torch.device(args.device)
