"""Tables in the terminal and in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Prints tables whole where the output is a file or a pipe."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=180)


def table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal: the first column to the left, all others to the right."""
    out = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        out.add_column(column, justify="right" if place else "left", no_wrap=True)
    for line in cells:
        out.add_row(*line)
    return out


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The same in markdown."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Three digits and more where there are more before the point; nothing for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(above: Mapping[str, Any] | None, below: Mapping[str, Any] | None, key: str) -> str:
    """above[key] / below[key]; nothing where one is missing."""
    if above is None or below is None or not below[key]:
        return ""
    return f"{above[key] / below[key]:.2f}"


def verdict(row: Mapping[str, Any]) -> str:
    """Whether the row matched the reference."""
    return "yes" if row["match"] else "NO"
