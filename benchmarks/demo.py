"""The main job on real pictures: train a network with a backdoor and one without, repair both with default settings.

    python -m benchmarks.demo [--seed N]

Nothing here is tuned to the digits: `mnp_fast.prune` gets 300 clean pictures and its defaults. The trigger is used to
make the backdoor and to measure it, before and after, and for nothing else.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Console
from rich.table import Table

import mnp_fast
from benchmarks import digits


def main() -> None:
    """Train, repair, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of training and of the repair (default: 0)")
    seed = parser.parse_args().seed
    console = Console(highlight=False)
    data = digits.load(seed)
    console.print(
        f"{len(data.train[1])} digits to train on, {digits.DEFENCE} clean ones for the defence, {digits.TEST} for tests"
    )
    before_after = Table("", "ACC", "ASR", "DER", "neurons pruned", "seconds")
    stages = Table("stage (seconds)")
    sites = Table("pruned per site", "of")
    columns: list[Any] = []
    verdicts: list[str] = []
    for name, backdoored in (("backdoored", True), ("clean twin", False)):
        start = time.perf_counter()
        model = digits.train(data, backdoored=backdoored, seed=seed)
        console.print(f"trained the {name} network in {time.perf_counter() - start:.0f} s; repairing it ...")
        start = time.perf_counter()
        result = mnp_fast.prune(
            model, data.loader(), triggered_loader=data.triggered() if backdoored else None, seed=seed
        )
        seconds = time.perf_counter() - start
        assert result.model is not None
        was, now = (digits.accuracy(network, *data.test) for network in (model, result.model))
        asr = [digits.attack_success(network, data) if backdoored else None for network in (model, result.model)]
        der = f"{result.metrics['der']:.3f}" if backdoored else ""
        before_after.add_row(name, f"{was:.3f}", _number(asr[0]), "", "", "")
        pruned = sum(map(len, result.pruned.values()))
        total = sum(map(len, result.masks.values()))
        before_after.add_row("  repaired", f"{now:.3f}", _number(asr[1]), der, f"{pruned} of {total}", f"{seconds:.1f}")
        suspect = "" if result.suspected_target is None else f", suspected target {result.suspected_target}"
        truth = f" (the attacker's is {digits.TARGET})" if backdoored else ""
        verdicts.append(f"verdict on the {name} network: {result.verdict}{suspect}{truth}")
        columns.append(result)
        stages.add_column(name, justify="right")
        sites.add_column(name, justify="right")
    for name in dict.fromkeys(entry["stage"] for result in columns for entry in result.history):
        stages.add_row(name, *(_seconds(result, name) for result in columns))
    for site, mask in columns[0].masks.items():
        sites.add_row(site, str(len(mask)), *(str(len(result.pruned[site])) for result in columns))
    console.print(before_after, sites, stages, *verdicts, sep="\n")
    console.print("A verdict is evidence, never proof.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _seconds(result: Any, stage: str) -> str:
    return next((f"{entry['seconds']:.1f}" for entry in result.history if entry["stage"] == stage), "")


if __name__ == "__main__":
    main()
