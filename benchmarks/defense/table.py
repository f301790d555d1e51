"""Tables of what the defences did, from the files that the command run wrote.

python -m benchmarks.defense table FILE... [--by attack|method|network|data|pictures|shift|config] [--write [FILE]]

Written are the tables between <!-- benchmark:defense-NAME --> and <!-- /benchmark --> of docs/results.md: cases,
methods, magnitudes, clean, detection, pictures, curve, shifts, configs; those without any row are left as they are.
Methods and settings are compared on the networks and seeds that all of them have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks import results_file
from benchmarks.defense.baselines import ABLATIONS
from benchmarks.defense.run import key
from benchmarks.plot import ROOT, described, replace_tables
from benchmarks.tables import console, markdown
from mnp_fast.detect import EVIDENCE, SUSPICIOUS

Row = Mapping[str, Any]

BY = ("attack", "method", "network", "data", "pictures", "shift", "config")
SETTINGS = ("shift", "config", "pictures")
PICTURES = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="of the command run; later ones win")
    parser.add_argument("--by", choices=BY, help="print one table only: the methods, for each value of this field")
    parser.add_argument("--method", default="mnp", help="of the tables of cases and settings (default: mnp)")
    parser.add_argument("--section", default="defense", help="first part of the markers' names (default: defense)")
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=ROOT / "docs" / "results.md",
        metavar="FILE",
        help="replace the tables of FILE (default: docs/results.md)",
    )


def main(args: argparse.Namespace) -> None:
    """Print the tables, or write them."""
    contents, out = [results_file.load(file) for file in args.files], console()
    if args.by:
        out.print(methods_table(rows_of(contents), args.by), markup=False)
        return
    found = blocks(contents, args.section, args.method)
    if args.write is None:
        for name, text in found.items():
            out.print(f"{name}\n\n{text}\n", markup=False)
        return
    text, names = replace_tables(args.write.read_text(), found)
    args.write.write_text(text)
    out.print(f"tables in {args.write}: {', '.join(names) or 'it has no markers of these'}")


def blocks(contents: Sequence[Mapping[str, Any]], section: str, method: str = "mnp") -> dict[str, str]:
    """Where they were made and the tables of these results, by the name of their markers in a page."""
    where = "\n".join(dict.fromkeys(described(content["environment"]) for content in contents))
    filled = {name: text for name, text in tables(rows_of(contents), method).items() if len(text.splitlines()) > 2}
    return {f"{section}-{name}": f"{where}\n\n{text}" for name, text in filled.items()}


def rows_of(contents: Iterable[Mapping[str, Any]]) -> list[Row]:
    """All rows, of each job the last. SystemExit where two networks are named alike."""
    by_job: dict[Any, Row] = {}
    for row in (row for content in contents for row in content["rows"]):
        before = by_job.setdefault(key(row), row)["acc_before"]
        if before != row["acc_before"]:
            raise SystemExit(
                f"two networks are named {row['case']} (accuracy {before:.4f} and {row['acc_before']:.4f}): "
                "give their files one at a time"
            )
        by_job[key(row)] = row
    return list(by_job.values())


def tables(rows: Sequence[Row], method: str = "mnp") -> dict[str, str]:
    """Markdown by name."""
    own = [row for row in rows if row["method"] == method]
    compared = [row for row in rows if row["method"] not in ABLATIONS]
    return {
        "cases": cases_table(usual(rows), method),
        "methods": methods_table(compared, "method"),
        "magnitudes": methods_table([row for row in rows if row["method"] in ("mnp", *ABLATIONS)], "method"),
        "clean": clean_table(usual(compared)),
        "detection": detection_table(usual(compared)),
        "pictures": methods_table(own, "pictures"),
        "curve": curve_table(own),
        "shifts": methods_table(own, "shift"),
        "configs": methods_table(own, "config"),
    }


def usual(rows: Iterable[Row], varied: str = "") -> list[Row]:
    """Rows with the usual settings, but for one that is varied."""
    default = {"shift": "none", "config": {}, "pictures": PICTURES}
    return [row for row in rows if all(row[name] == default[name] for name in SETTINGS if name != varied)]


# ---------------------------------------------------------------- tables
def cases_table(rows: Sequence[Row], method: str) -> str:
    """A line a case: means over the seeds, standard deviations after a +-, the worst ASR.

    ASR of a clean network: what the trigger does to one that was trained alike without the attack.
    """
    columns = ["case", "seeds", "ACC before", "after", "ASR of a clean network", "ASR before", "after", "worst"]
    columns += ["robust ACC", "DER"]
    columns += ["target named", "verdicts", "pruned", "s"]
    cells = []
    for (case,), of in _groups([row for row in rows if row["method"] == method], "case").items():
        verdicts = ", ".join(dict.fromkeys(row["verdict"] or "" for row in of))
        cells.append(
            [
                case,
                str(len(of)),
                _mean(of, "acc_before"),
                _spread(of, "acc_after"),
                _mean(of, "asr_clean"),
                _mean(of, "asr_before"),
                _spread(of, "asr_after"),
                _worst(of, "asr_after"),
                _mean(of, "racc_after"),
                _spread(of, "der"),
                _named(of),
                verdicts,
                f"{fmean(row['pruned'] / row['neurons'] for row in of):.1%}",
                f"{fmean(row['seconds'] for row in of):.1f}",
            ]
        )
    return markdown(columns, cells)


def methods_table(rows: Sequence[Row], by: str) -> str:
    """A line a method, or one for each value of ``by`` and each method, over attacked networks; best mean DER first."""
    names = ["method"] if by == "method" else [by, "method"]
    attacked = [row for row in usual(rows, by) if row["der"] is not None]
    columns = [*names, "runs", "ACC drop", "ASR", "worst ASR", "robust ACC", "DER", "s"]
    picked = ("acc", "asr", "der") if _values(attacked, "oracle_der") else ()
    columns += [f"test-picked threshold: {name.upper()}" for name in picked]
    groups = _groups(_common(attacked, by) if by in ("method", *SETTINGS) else attacked, *names)
    order = sorted(groups, key=lambda group: (*_sortable(group[:-1]), -fmean(row["der"] for row in groups[group])))
    cells = []
    for group in order:
        of = groups[group]
        drop = fmean(row["acc_before"] - row["acc_after"] for row in of)
        cells.append(
            [
                *map(_shown, group),
                str(len(of)),
                f"{drop:.3f}",
                _mean(of, "asr_after"),
                _worst(of, "asr_after"),
                _mean(of, "racc_after"),
                _mean(of, "der"),
                f"{fmean(row['seconds'] for row in of):.1f}",
                *(_mean(of, f"oracle_{name}") for name in picked),
            ]
        )
    return markdown(columns, cells)


def curve_table(rows: Sequence[Row]) -> str:
    """A line an attack: ASR, and in brackets the drop of ACC, with each number of pictures, over the same networks."""
    of = _common([row for row in usual(rows, "pictures") if row["der"] is not None], "pictures")
    counts = sorted({row["pictures"] for row in of})
    cells = []
    for (attack,), part in _groups(of, "attack").items():
        line = [str(attack)]
        for count in counts:
            here = [row for row in part if row["pictures"] == count]
            drop = fmean(row["acc_before"] - row["acc_after"] for row in here)
            line.append(f"{_mean(here, 'asr_after')} ({drop:.3f})")
        cells.append(line)
    return markdown(["attack", *map(str, counts)], cells)


def clean_table(rows: Sequence[Row]) -> str:
    """A line a method, over networks without a backdoor: what repairing them costs, and what is said of them."""
    columns = ["method", "networks", "runs", "ACC drop", "worst drop", "false alarms (or suspicious)"]
    cells = []
    for (method,), of in _groups([row for row in rows if row["der"] is None], "method").items():
        drops = [row["acc_before"] - row["acc_after"] for row in of]
        judged = [row for row in of if row["verdict"] is not None]
        networks = str(len({row["case"] for row in of}))
        cells.append([method, networks, str(len(of)), f"{fmean(drops):.3f}", f"{max(drops):.3f}", _alarms(judged)])
    return markdown(columns, cells)


def detection_table(rows: Sequence[Row]) -> str:
    """A line for each method that judges and each attack, against all clean networks; all attacks last.

    AUROC of the score; detected, false alarms: runs with the verdict "evidence of a backdoor", and in brackets with
    that or "suspicious". Where there are networks without BatchNorm, which are never more than suspicious, a last line
    leaves them out.
    """
    columns = [
        "method",
        "attack",
        "runs",
        "AUROC",
        "detected (or suspicious)",
        "target named",
        "false alarms (or suspicious)",
    ]
    cells = []
    for (method,), of in _groups([row for row in rows if row["verdict"] is not None], "method").items():
        attacked = [row for row in of if row["der"] is not None]
        parts = [(str(attack), part, of) for (attack,), part in _groups(attacked, "attack").items()]
        if len(parts) > 1:
            parts.append(("all", attacked, of))
        normed = [row for row in of if row["evidence"]["batch_norms"]]
        if len(normed) < len(of):
            parts.append(("all with BatchNorm", [row for row in attacked if row in normed], normed))
        for name, part, among in parts:
            clean = [row for row in among if row["der"] is None]
            area = auroc(*([row["evidence"]["score"] for row in side] for side in (part, clean)))
            shown = "" if area is None else f"{area:.3f}"
            cells.append([method, name, str(len(part)), shown, _alarms(part), _named(part), _alarms(clean)])
    return markdown(columns, cells)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Chance that a positive scores above a negative, ties counting half; None where one side is empty."""
    if not positive or not negative:
        return None
    return fmean((p > n) + (p == n) / 2 for p, n in product(positive, negative))


# ---------------------------------------------------------------- cells
def _common(rows: Sequence[Row], by: str) -> list[Row]:
    """Rows of the networks and seeds that every value of ``by`` has."""
    having = [{(row["case"], row["seed"]) for row in part} for part in _groups(rows, by).values()]
    common = set.intersection(*having) if having else set()
    return [row for row in rows if (row["case"], row["seed"]) in common]


def _groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        values = (row[name] for name in names)
        group = tuple(json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for value in values)
        groups.setdefault(group, []).append(row)
    return groups


def _shown(value: Any) -> str:
    """A value of a group; settings as `--config` takes them."""
    if isinstance(value, str) and value.startswith("{"):
        return " ".join(f"{name}={setting}" for name, setting in json.loads(value).items()) or "defaults"
    return str(value)


def _sortable(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value if isinstance(value, int) else str(value) for value in values)


def _values(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _mean(rows: Sequence[Row], name: str) -> str:
    values = _values(rows, name)
    return f"{fmean(values):.3f}" if values else ""


def _worst(rows: Sequence[Row], name: str) -> str:
    values = _values(rows, name)
    return f"{max(values):.3f}" if values else ""


def _spread(rows: Sequence[Row], name: str) -> str:
    values = _values(rows, name)
    return f"{fmean(values):.3f} +- {stdev(values):.3f}" if len(values) > 1 else _mean(rows, name)


def _named(rows: Sequence[Row]) -> str:
    """How often the attacker's class was suspected, of the runs where there is one and the method judges."""
    judged = [row for row in rows if row["target"] is not None and row["verdict"] is not None]
    return f"{sum(row['suspected_target'] == row['target'] for row in judged)} of {len(judged)}" if judged else ""


def _alarms(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    evidence, suspicious = (sum(row["verdict"] == word for row in rows) for word in (EVIDENCE, SUSPICIOUS))
    return f"{evidence} ({evidence + suspicious}) of {len(rows)}"
