"""Figures, and the tables of README.md and docs/speed.md, from the results files.

    python -m benchmarks.plot [--results DIR] [--figures DIR] [--page FILE ...] [--no-figures]

Reads <results>/<benchmark>/<environment>.json, draws docs/figures/<benchmark>-<environment>.svg, and replaces what
stands between <!-- benchmark:NAME --> and <!-- /benchmark --> in each page by the table of that benchmark; where it
has no results, what stands there stays. Figures need matplotlib: pip install 'mnp_fast[plot]'.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results_file
from benchmarks.options import PROVIDERS
from benchmarks.tables import console, markdown, number, ratio

Row = dict[str, Any]

END_TO_END_STAGES = ("suppress", "search", "weigh", "perturb", "masks", "select", "fine-tune")
Content = Mapping[str, Any]

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md")
COLORS = {"published": "#9a9a9a", "tuned_eager": "#6f9fd8", "torch_compile": "#e0a050", "mnp_fast": "#2f8f4e"}
_BLOCK = re.compile(r"(<!-- benchmark:(?P<name>[\w-]+) -->\n)(.*?)(<!-- /benchmark -->)", re.DOTALL)


def main() -> int:
    """Draw, and rewrite the pages where they have markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results_file.FOLDER)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--page", type=Path, action="append", help="repeatable (default: README.md, docs/speed.md)")
    parser.add_argument("--no-figures", action="store_true", help="tables only, without matplotlib")
    args = parser.parse_args()
    out = console()
    found = read(args.results)
    if not found:
        raise SystemExit(f"there are no results under {args.results}: run a benchmark with --json first")
    by_name = {name: tables(name, contents) for name, contents in found.items()}
    for page in args.page or PAGES:
        text = page.read_text()
        new, names = replace_tables(text, by_name)
        if new != text:
            page.write_text(new)
        out.print(f"tables in {page}: {', '.join(names) or 'no markers of a benchmark that has results'}")
    # Last: the tables need no matplotlib.
    if not args.no_figures:
        for file in draw(found, args.figures):
            out.print(f"drawn: {file}")
    return 0


def read(folder: Path) -> dict[str, dict[str, Content]]:
    """{benchmark: {environment key: content}} of the benchmarks that have a table."""
    found: dict[str, dict[str, Content]] = {}
    for file in sorted(folder.glob("*/*.json")):
        if file.parent.name in TABLES:
            found.setdefault(file.parent.name, {})[file.stem] = results_file.load(file)
    return found


# ---------------------------------------------------------------- tables
def replace_tables(text: str, by_name: Mapping[str, str]) -> tuple[str, list[str]]:
    """(text with the blocks of these names replaced, names that were found). Blocks of other names stay as they are."""
    names = []

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in by_name:
            return match[0]
        names.append(name)
        return f"{match[1]}{by_name[name].rstrip()}\n{match[4]}"

    return _BLOCK.sub(block, text), names


def tables(benchmark: str, contents: Mapping[str, Content]) -> str:
    """Markdown of one benchmark: for each environment a line that says what it is, and a table."""
    parts = [
        f"{described(content['environment'])}\n\n{TABLES[benchmark](content['rows'])}" for content in contents.values()
    ]
    return "\n\n".join(parts)


def described(environment: Mapping[str, Any]) -> str:
    """One line: device, threads, versions, date."""
    threads = environment["threads"]
    if environment["device"] != environment["cpu"]:
        where = environment["device"]
    elif isinstance(threads, list):
        where = f"{environment['device']}, {' and '.join(map(str, threads))} threads"
    else:
        where = f"{environment['device']}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{where}; torch {environment['torch']}; {environment.get('date', '')}".rstrip("; ")


def step_table(rows: Sequence[Row]) -> str:
    """A line for each network, batch and dtype."""
    columns = ["network", "batch", "dtype", *(f"{name}, ms" for name in PROVIDERS)]
    columns += ["x published", "x tuned_eager", "x torch_compile", "peak MB: published", "mnp_fast"]
    columns += ["held MB: published", "mnp_fast", "compile s"]
    cells = []
    for (arch, size, batch, dtype), by in _groups(rows, "arch", "size", "batch", "dtype").items():
        published, compiled, ours = by.get("published"), by.get("torch_compile"), by.get("mnp_fast")
        cells.append(
            [
                f"{arch}, {size}x{size}",
                str(batch),
                dtype,
                *(_cell(by.get(name), "median_ms") for name in PROVIDERS),
                ratio(published, ours, "median_ms"),
                ratio(by.get("tuned_eager"), ours, "median_ms"),
                ratio(compiled, ours, "median_ms"),
                _cell(published, "peak_mb"),
                _cell(ours, "peak_mb"),
                _cell(published, "held_mb"),
                _cell(ours, "held_mb"),
                _cell(compiled, "compile_s"),
            ]
        )
    return markdown(columns, cells)


def end_to_end_table(rows: Sequence[Row]) -> str:
    """A line for each network, with the seconds of each stage under each provider."""
    columns = [
        "network",
        "pictures",
        "batch",
        "dtype",
        "provider",
        *END_TO_END_STAGES,
        "compile",
    ]
    cells = []
    # Rows of before know of no looks; those of different numbers of them are different work.
    rows = [{"looks": None} | dict(row) for row in rows]
    for (arch, size, _, *others), by in _groups(rows, "arch", "size", "looks", "pictures", "batch", "dtype").items():
        for name in PROVIDERS:
            row = by.get(name)
            if row is None:
                continue
            stages = [number(row["stages_s"].get(stage)) for stage in END_TO_END_STAGES]
            total = f"{_cell(row, 'seconds')}{' (extrapolated)' if row['extrapolated'] else ''}"
            faster = ratio(row, by.get("mnp_fast"), "seconds")
            begin = [f"{arch}, {size}x{size}", *map(str, others), name]
            cells.append([*begin, *stages, number(row["compile_s"]), total, faster])
    return markdown([*columns, "total, s", "mnp_fast is faster by"], cells)


def ops_table(rows: Sequence[Row]) -> str:
    """A line for each op, case, memory order and dtype: its largest input, with every number of threads."""
    threads = sorted({row["threads"] for row in rows})
    compiled = any(row["provider"] == "torch_compile" for row in rows)
    columns = ["op", "case", "shape", "memory", "dtype"]
    for count in threads:
        at = f", {count} thread{'s' if count > 1 else ''}" if len(threads) > 1 else ""
        columns += [f"ms{at}", "of copy", "x plain torch", *(["x torch_compile"] if compiled else [])]
    cells = []
    for (op, case, memory, dtype), own in _apart(rows, "op", "case", "memory", "dtype").items():
        # Of equal inputs the first.
        shape = max(own, key=lambda row: row["bytes"])["shape"]
        by_threads = _groups([row for row in own if row["shape"] == shape], "threads")
        line = [op, case, "x".join(map(str, shape)), memory, dtype]
        for count in threads:
            by = by_threads.get((count,), {})
            ours = by.get("mnp_fast")
            line += [_cell(ours, "median_ms"), number(ours["of_copy"]) if ours else ""]
            line += [ratio(by.get("tuned_eager"), ours, "median_ms")]
            line += [ratio(by.get("torch_compile"), ours, "median_ms")] if compiled else []
        cells.append(line)
    return markdown(columns, cells)


def stats_table(rows: Sequence[Row]) -> str:
    """A line for each statistic and network."""
    columns = ["statistic", "network", "batch", "plain, ms", "mnp_fast, ms", "x plain", "peak MB: plain", "mnp_fast"]
    cells = []
    for (quantity, arch, size, batch), by in _groups(rows, "quantity", "arch", "size", "batch").items():
        plain, ours = by.get("tuned_eager"), by.get("mnp_fast")
        times = [_cell(row, "median_ms") for row in (plain, ours)]
        peaks = [_cell(row, "peak_mb") for row in (plain, ours)]
        ahead = ratio(plain, ours, "median_ms")
        cells.append([quantity, f"{arch}, {size}x{size}", str(batch), *times, ahead, *peaks])
    return markdown(columns, cells)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "step": step_table,
    "end_to_end": end_to_end_table,
    "ops": ops_table,
    "stats": stats_table,
}


def _groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """{values of the keys: {provider: row}}, in order of appearance."""
    return {group: {row["provider"]: row for row in own} for group, own in _apart(rows, *keys).items()}


def _apart(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """{values of the keys: rows}, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        values = (row[key] for key in keys)
        group = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        groups.setdefault(group, []).append(row)
    return groups


def _cell(row: Row | None, key: str) -> str:
    """A number, marked where the row did not match the reference."""
    if row is None or row.get(key) is None:
        return ""
    return number(row.get(key)) + ("" if row["match"] else " (mismatch)")


# ---------------------------------------------------------------- figures
def draw(found: Mapping[str, Mapping[str, Content]], folder: Path) -> list[Path]:
    """An SVG for each results file of ops, step and end_to_end; returns them."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install 'mnp_fast[plot]', or give --no-figures") from None
    plt.rcParams["svg.hashsalt"] = "mnp_fast"  # the same results, the same file
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for benchmark, contents in found.items():
        for key, content in contents.items():
            bars = _bars(benchmark, content["rows"])
            if not bars:
                continue
            figure, axes = plt.subplots(figsize=(9, 1.5 + 0.45 * len(bars)))
            _draw_bars(axes, bars)
            axes.set_xlabel(_unit(benchmark, content["rows"]))
            axes.set_title(f"{benchmark}: {described(content['environment'])}", fontsize=9)
            file = folder / f"{benchmark}-{key}.svg"
            figure.savefig(file, bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            files.append(file)
    return files


def _unit(benchmark: str, rows: Sequence[Row]) -> str:
    if benchmark == "ops":
        return "bandwidth as a share of a copy's: median over shapes, least and greatest"
    guessed = [name for name in PROVIDERS if any(r["provider"] == name and r.get("extrapolated") for r in rows)]
    return f"ms ({', '.join(guessed)}: extrapolated)" if guessed else "ms: median, 20th and 80th percentile"


def _bars(benchmark: str, rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """{label: {provider: (value, lower end, upper end)}}."""
    if benchmark == "ops":
        shares: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            label = f"{row['op']}, {row['dtype']}, threads {row['threads']}"
            shares.setdefault(label, {}).setdefault(row["provider"], []).append(row["of_copy"])
        return {
            label: {name: (sorted(values)[len(values) // 2], min(values), max(values)) for name, values in by.items()}
            for label, by in shares.items()
        }
    if benchmark not in ("step", "end_to_end"):
        return {}
    return {
        " ".join(map(str, key)): {name: (row["median_ms"], row["p20_ms"], row["p80_ms"]) for name, row in by.items()}
        for key, by in _groups(rows, "arch", "size", "batch", "dtype").items()
    }


def _draw_bars(axes: Any, bars: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    names = [name for name in PROVIDERS if any(name in by for by in bars.values())]
    height = 0.8 / len(names)
    for number_, name in enumerate(names):
        places = [i + number_ * height for i, by in enumerate(bars.values()) if name in by]
        values = [by[name] for by in bars.values() if name in by]
        ends = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
        axes.barh(
            places, [v for v, _, _ in values], height, xerr=ends, label=name, color=COLORS[name], ecolor="#404040"
        )
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(bars))], list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
