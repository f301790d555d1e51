"""One step of mask learning on the frozen clean model, by four providers: time, peak memory, and whether they agree.

    python -m benchmarks.step [--arch NAME ...] [--batch N] [--dtype ...] [--device cpu|cuda] [--json [FILE]]

What a step and a provider is: benchmarks/providers.py. All providers run in one process on the same input, in turns.
Before any time is taken, loss and mask gradient of the first step are compared with a reference; a provider that does
not match is printed and stored as such, and the exit status is 1. Times are milliseconds a step; "peak MB" is memory
that a step takes at most beyond what stands between steps, "held MB" what stands there beyond one copy of the weights
(packed weights, for one; of torch_compile as of tuned_eager), and "of published" the ratio of their sums
(benchmarks/memory.py); "compile s" is what the first step of torch.compile took more. On CUDA the rows of mnp_fast
and tuned_eager say in "cuda_graph" whether their step was captured, or why not; the others have no graph.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import options, results_file
from benchmarks.environment import environment
from benchmarks.memory import held_mb, peak_mb
from benchmarks.models import Workload, workload
from benchmarks.providers import GRADIENT_TOLERANCE, LOSS_TOLERANCE, RATIO, Check, MnpFast, Step, Tuned, steps
from benchmarks.tables import console, number, ratio, table, verdict
from benchmarks.timing import interleaved, summary
from mnp_fast.memory import kept

Row = dict[str, Any]


def main() -> int:
    """Measure every architecture; 1 where a provider does not match."""
    parser = options.parser(__doc__, repeats=10, arch="resnet18")
    options.add_threads(parser)
    options.add_providers(parser)
    args = parser.parse_args()
    device = options.device_of(args)
    torch.set_num_threads(args.threads)
    dtype = options.DTYPES[args.dtype]
    out = console()
    gradient = f"{GRADIENT_TOLERANCE:g} (L2)" if dtype == torch.float32 else f"{RATIO:g} times the error of tuned_eager"
    out.print(
        f"match: loss within {LOSS_TOLERANCE[dtype]:g} of the float32 reference's, gradient within {gradient}; "
        f"published: {LOSS_TOLERANCE[torch.float32]:g} and {GRADIENT_TOLERANCE:g}, of a reference on batch statistics"
    )
    found = []
    for arch in args.arch or ["resnet18"]:
        work = workload(arch, args.batch, device, args.size)
        rows = measure(work, dtype, args.provider or options.PROVIDERS, args.repeats)
        out.print(show(rows))
        found += rows
        if args.json:
            file = results_file.save(args.json, "step", environment(args.device, [args.threads]), rows)
            out.print(f"written to {file}")
    return 0 if all(row["match"] for row in found) else 1


def measure(work: Workload, dtype: torch.dtype, names: Sequence[str], repeats: int) -> list[Row]:
    """A row a provider: checked, then timed in turns, then its peak memory."""
    device = work.images.device
    check = Check(work, names, dtype)
    rows: dict[str, Row] = {}
    ready: dict[str, Step] = {}
    for name, step in steps(work, dtype, names):
        start = time.perf_counter()
        loss = float(step())
        first_ms = (time.perf_counter() - start) * 1e3
        rows[name] = {
            "arch": work.arch,
            "size": work.images.shape[-1],
            "batch": len(work.images),
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "provider": name,
            "computes_in": "float32" if name == "published" else str(dtype).removeprefix("torch."),
            "first_step_ms": round(first_ms, 1),
            **check(name, step, loss),
        }
        if isinstance(step, Tuned | MnpFast) and step.recorder is not None:
            rows[name]["cuda_graph"] = step.recorder.reason or "captured"
        ready[name] = step
    with kept():  # as in a run: freed memory is there for the next step
        for name, times in interleaved(ready, repeats, device, settle=True).items():
            rows[name] |= summary(times) | {"repeats": repeats}
    for name, row in rows.items():
        ready[name].release()
        row["peak_mb"] = float(f"{peak_mb(ready[name], device):.4g}")
        if name == "torch_compile":
            row["compile_s"] = round((row["first_step_ms"] - row["median_ms"]) / 1e3, 1)
    for step in ready.values():
        step.close()
    for name, row in rows.items():
        row["held_mb"] = float(f"{_held_mb(work, dtype, name):.4g}")
    return list(rows.values())


def _held_mb(work: Workload, dtype: torch.dtype, name: str) -> float:
    def make() -> Step:
        # What torch.compile holds besides is the compiler's.
        ((_, step),) = steps(work, dtype, ["tuned_eager" if name == "torch_compile" else name])
        step()
        step.release()
        return step

    held = held_mb(make, work.images.device, lambda step: step.close())
    weights = sum(tensor.nbytes for tensor in (*work.model.parameters(), *work.model.buffers())) / 1e6
    return max(0.0, held - weights)


def show(rows: Sequence[Row]) -> Any:
    """The rows of one architecture."""
    first = rows[0]
    by = {row["provider"]: row for row in rows}
    title = f"step: {first['arch']}, {first['size']}x{first['size']}, batch {first['batch']}, {first['dtype']}"
    columns = ["provider", "ms", "20 %", "80 %", "x published", "x compile", "peak MB", "held MB", "of published"]
    columns += ["compile s"]
    sums: dict[str, Row] = {name: {"mb": row["peak_mb"] + row["held_mb"]} for name, row in by.items()}
    cells = []
    for row in rows:
        published, compiled = by.get("published"), by.get("torch_compile")
        cells.append(
            [
                row["provider"],
                number(row["median_ms"]),
                number(row["p20_ms"]),
                number(row["p80_ms"]),
                ratio(published, row, "median_ms"),
                ratio(compiled, row, "median_ms"),
                number(row["peak_mb"]),
                number(row["held_mb"]),
                ratio(sums[row["provider"]], sums.get("published"), "mb"),
                number(row.get("compile_s")),
                verdict(row),
            ]
        )
    return table(f"{title}, {first['device']}, {first['threads']} threads", [*columns, "match"], cells)


if __name__ == "__main__":
    sys.exit(main())
