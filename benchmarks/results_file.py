"""Results files: {"environment": ..., "rows": [...]}, written whole or not at all."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment_key, same_environment
from benchmarks.options import BESIDE_OTHERS

Row = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "results"
IDENTITY = (
    "op",
    "case",
    "quantity",
    "arch",
    "shape",
    "memory",
    "size",
    "pictures",
    "looks",
    "batch",
    "dtype",
    "threads",
    "provider",
    "method",
    "seed",
    "shift",
    "config",
    "test",
)
"""What tells rows of one file apart; each benchmark has some of them."""


def load(file: Path) -> dict[str, Any]:
    """The content of a results file. SystemExit where there is none."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        if {"environment", "rows"} <= content.keys():
            return content
        reason = "it has no environment and rows"
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error)
    raise SystemExit(f"{file} is no results file ({reason}): name one that a benchmark wrote")


def save(file: Path, benchmark: str, environment: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Add ``rows`` to ``file``, each in place of the one with the same identity; returns where they are now.

    An interrupted write leaves the old file. SystemExit where the file holds rows of another environment.
    """
    if str(file) == BESIDE_OTHERS:
        file = FOLDER / benchmark / f"{environment_key(environment)}.json"
    old: dict[str, Any] = load(file) if file.exists() else {"environment": environment, "rows": []}
    if not same_environment(old["environment"], environment):
        was = old["environment"]
        common = sorted(was.keys() & environment.keys() - {"date"})
        differing = [name for name in common if was[name] != environment[name]]
        raise SystemExit(f"{file} was measured in another environment ({', '.join(differing)}): name another file")
    new = {_identity(row) for row in rows}
    kept = [row for row in old["rows"] if _identity(row) not in new]
    dated = {**environment, "date": datetime.date.today().isoformat()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"environment": dated, "rows": [*kept, *rows]}, indent=1) + "\n")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in IDENTITY)
