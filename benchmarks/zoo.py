"""Repair every network of a zoo with default settings and measure ACC, ASR and DER on test pictures.

    python -m benchmarks.zoo --zoo DIR [--cases NAME ...] [--seeds 0 1 2] [--pictures 500] [--json FILE]
    python -m benchmarks.zoo --table FILE       the means of a results file, as in the README

DIR holds zoo.py with CASES, load(name) -> case (model, dataset, preprocess, trigger, target), and
images(dataset, split) -> (uint8 NHWC pictures, labels). The defence gets clean training pictures, drawn by the seed;
triggers and test pictures only measure. Rows are added to FILE, one for each (case, seed, pictures, environment).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mnp_fast
from benchmarks.environment import environment, same_environment

TEST = 2000


def main() -> None:
    """Run the cases and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--zoo", type=Path, metavar="DIR", help="folder with zoo.py")
    what.add_argument("--table", type=Path, metavar="FILE", help="a results file")
    parser.add_argument("--cases", nargs="*", help="default: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())["rows"]))
        return
    zoo = _module(args.zoo / "zoo.py")
    for name in args.cases or zoo.CASES:
        for seed in args.seeds:
            row = measure(zoo, name, seed, args.pictures)
            print(json.dumps(row), flush=True)
            if args.json:
                append(args.json, row)


def measure(zoo: Any, name: str, seed: int, pictures: int) -> dict[str, Any]:
    """One repair: what it found, and accuracy on test pictures before and after."""
    case = zoo.load(name)
    images, labels = _images(zoo, case.dataset, "train")
    pick = np.sort(np.random.default_rng(1000 + seed).permutation(len(labels))[:pictures])
    clean = TensorDataset(case.preprocess(np.array(images[pick])), torch.from_numpy(labels[pick]).long())
    start = time.perf_counter()
    result = mnp_fast.prune(case.model, DataLoader(clean, batch_size=100), seed=seed, progress=False)
    seconds = time.perf_counter() - start
    assert result.model is not None
    before, after = (_test(zoo, case, network) for network in (case.model, result.model))
    row: dict[str, Any] = {"case": name, "seed": seed, "pictures": pictures, "verdict": result.verdict}
    row |= {"suspected_target": result.suspected_target, "target": case.target}
    row |= {"acc_before": before[0], "acc_after": after[0], "asr_before": before[1], "asr_after": after[1]}
    if before[1] is not None and after[1] is not None:
        row["der"] = (max(0.0, before[1] - after[1]) - max(0.0, before[0] - after[0]) + 1) / 2
    row |= {"pruned": sum(map(len, result.pruned.values())), "neurons": sum(map(len, result.masks.values()))}
    row |= {"collapse_share": result.evidence["collapse_share"], "second_share": result.evidence["second_share"]}
    row |= {"held_back": result.metrics, "seconds": round(seconds, 1), "masks_sha256": _digest(result)}
    row["stages"] = {entry["stage"]: round(entry["seconds"], 1) for entry in result.history}
    row["peak_mb"] = round(max(entry["peak_mb"] for entry in result.history))
    return row


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a results file, in place of one with the same key."""
    here = environment()
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"environment": here, "rows": []}
    if not same_environment(content["environment"], here):
        raise SystemExit(f"{file} was measured in another environment; name another file")
    key = ("case", "seed", "pictures")
    rows = [old for old in content["rows"] if any(old[k] != row[k] for k in key)]
    content["rows"] = sorted([*rows, row], key=lambda r: [r[k] for k in key])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a case, means over the seeds, the worst ASR in brackets."""
    lines = [
        "| network | ACC before | after | ASR before | after (worst) | DER | target named | verdicts | pruned | s |"
    ]
    lines.append("|---" * 10 + "|")
    for name in dict.fromkeys(row["case"] for row in rows):
        of = [row for row in rows if row["case"] == name]

        def mean(key: str, of: list[dict[str, Any]] = of) -> float:
            return sum(row[key] for row in of) / len(of)

        attack = ["", "", "", ""]
        if of[0]["target"] is not None:
            named = sum(row["suspected_target"] == row["target"] for row in of)
            worst = max(row["asr_after"] for row in of)
            attack = [f"{mean('asr_before'):.3f}", f"{mean('asr_after'):.3f} ({worst:.3f})", f"{mean('der'):.3f}"]
            attack.append(f"{named} of {len(of)}")
        verdicts = ", ".join(dict.fromkeys(row["verdict"] for row in of))
        share = f"{mean('pruned') / of[0]['neurons']:.1%}"
        cells = [name, f"{mean('acc_before'):.3f}", f"{mean('acc_after'):.3f}", *attack, verdicts, share]
        lines.append(f"| {' | '.join(cells)} | {mean('seconds'):.0f} |")
    return "\n".join(lines)


@torch.no_grad()
def _test(zoo: Any, case: Any, model: nn.Module) -> tuple[float, float | None]:
    images, labels = _images(zoo, case.dataset, "test")
    pick = np.sort(np.random.default_rng(0).permutation(len(labels))[:TEST])
    images, labels = np.array(images[pick]), labels[pick]

    def predict(pictures: Any) -> Any:
        parts: list[Tensor] = [model(case.preprocess(pictures[i : i + 250])) for i in range(0, len(pictures), 250)]
        return torch.cat(parts).argmax(1).numpy()

    accuracy = float((predict(images) == labels).mean())
    if case.trigger is None:
        return accuracy, None
    return accuracy, float((predict(case.trigger(images[labels != case.target])) == case.target).mean())


@functools.cache
def _images(zoo: Any, dataset: str, split: str) -> tuple[Any, Any]:
    return zoo.images(dataset, split)


def _digest(result: mnp_fast.PruneResult) -> str:
    """Of masks and repaired weights, so that two runs can be compared bit for bit."""
    assert result.model is not None
    digest = hashlib.sha256()
    for tensors in (result.masks, result.model.state_dict()):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("zoo", file)
    if spec is None or spec.loader is None or not file.exists():
        raise SystemExit(f"there is no {file}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.

    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
