"""Statistics of neurons: first-order saliency, exact saliency and magnitude, against what one would write without them.

    python -m benchmarks.stats [--arch NAME ...] [--batch N] [--neurons 256] [--device cpu|cuda] [--json [FILE]]

saliency: first-order saliency of all neurons, against one forward and backward of the loss under masks. exact: change
of the loss without each of --neurons neurons, against the loop that masks one neuron, runs, and measures; both on a
trace that is captured before. magnitude: L1, L2 and largest weight of every output channel of the network, against
torch calls layer by layer, left out where this version has no such op. All in float32. The exit status is 1 where a
result differs from the reference.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import options, results_file
from benchmarks.environment import environment, whole_float32
from benchmarks.layers import reference, rewrite
from benchmarks.memory import peak_mb
from benchmarks.models import Workload, workload
from benchmarks.providers import frozen, in_channels_last, split
from benchmarks.tables import console, number, ratio, table, verdict
from benchmarks.timing import interleaved, summary
from mnp_fast import ops as _ops
from mnp_fast.data import logits_of
from mnp_fast.graph.capture import capture
from mnp_fast.masked import Execution
from mnp_fast.memory import kept
from mnp_fast.stats import exact_saliency, saliency

Row = dict[str, Any]

# Without types: a version may lack what is asked of it.
ops: Any = _ops

TOLERANCE = 1e-3
"""L2 norm of the difference over that of the reference."""


class Comparison(NamedTuple):
    """One statistic by two providers: calls, and what both of them must give."""

    quantity: str
    calls: dict[str, Callable[[], Any]]
    error: Callable[[], float]


def main() -> int:
    """Measure every architecture; 1 where a result does not match."""
    parser = options.parser(__doc__, repeats=5, arch="resnet18")
    parser.set_defaults(dtype="float32")
    options.add_threads(parser)
    parser.add_argument("--neurons", type=int, default=256, help="of the exact saliency (default: 256)")
    args = parser.parse_args()
    if args.dtype != "float32":
        raise SystemExit("statistics are computed in float32: leave --dtype out")
    device = options.device_of(args)
    torch.set_num_threads(args.threads)
    out = console()
    found = []
    for arch in args.arch or ["resnet18"]:
        work = workload(arch, args.batch, device, args.size)
        rows = []
        with whole_float32():
            for part in measure(work, args.neurons, args.repeats):
                rows += part
                # At once: the next statistic may run for many minutes.
                if args.json:
                    used = environment(args.device, [args.threads])
                    out.print(f"{part[0]['quantity']} written to {results_file.save(args.json, 'stats', used, part)}")
        if rows:
            out.print(show(rows))
        for name in missing():
            out.print(f"{name} is left out: this version of mnp_fast has none")
        found += rows
    return 0 if all(row["match"] for row in found) else 1


def missing() -> list[str]:
    """Statistics that are not there."""
    return [f"{ops.__name__}.{name}" for name in ("channel_magnitude",) if not hasattr(ops, name)]


def measure(work: Workload, neurons: int, repeats: int) -> Iterator[list[Row]]:
    """Two rows a statistic."""
    device = work.images.device
    for quantity, calls, error in comparisons(work, neurons):
        rows = []
        wrong = error()
        with kept():  # for all alike, as ours does by itself
            times = interleaved(calls, repeats, device)
        for name in calls:
            row: Row = {"quantity": quantity, "arch": work.arch, "size": work.images.shape[-1]}
            row |= {"batch": len(work.images), "dtype": "float32", "device": device.type}
            row |= {"threads": torch.get_num_threads(), "provider": name, "repeats": repeats}
            row |= summary(times[name]) | {"peak_mb": float(f"{peak_mb(calls[name], device):.4g}")}
            # The plain version is the reference.
            rows.append(row | {"error": float(f"{wrong:.3g}"), "match": wrong <= TOLERANCE})
        yield rows


def comparisons(work: Workload, neurons: int) -> Iterator[Comparison]:
    """Those that this version has."""
    model, sites, images, labels = work.model, work.sites, work.images, work.labels
    how = Execution(capture(model, sites, images))
    yield Comparison(
        "saliency",
        {"tuned_eager": _one_backward(work), "mnp_fast": lambda: saliency(model, sites, images, labels, how=how)},
        lambda: _saliency_error(work, how),
    )
    # Spread over all layers.
    total = len(work.mask)
    chosen = torch.linspace(0, total - 1, min(neurons, total), device=images.device).long()
    calls = {
        "tuned_eager": lambda: plain_loop(work, chosen),
        "mnp_fast": lambda: exact_saliency(model, sites, images, labels, chosen, how=how),
    }
    yield Comparison(
        f"exact saliency of {len(chosen)}", calls, lambda: _error(calls["mnp_fast"](), calls["tuned_eager"]())
    )
    if hasattr(ops, "channel_magnitude"):
        weights = [p.detach().flatten(1) for p in model.parameters() if p.dim() > 1]
        magnitudes: dict[str, Callable[[], Tensor]] = {
            "tuned_eager": lambda: plain_magnitude(weights),
            "mnp_fast": lambda: ops.channel_magnitude(weights),
        }
        yield Comparison("magnitude", magnitudes, lambda: _error(magnitudes["mnp_fast"](), magnitudes["tuned_eager"]()))


# ---------------------------------------------------------------- what one would write
def _one_backward(work: Workload) -> Callable[[], Tensor]:
    """Forward and backward of the loss under masks that are all one, weights frozen."""
    masks = split(torch.ones_like(work.mask), work.sites)
    net = frozen(rewrite(work.model, work.sites, masks, on_weights=False), masks)
    images = in_channels_last(work.images)

    def run() -> Tensor:
        return torch.cat(torch.autograd.grad(F.cross_entropy(logits_of(net(images)), work.labels), masks))

    return run


@torch.no_grad()
def plain_loop(work: Workload, neurons: Tensor) -> Tensor:
    """Change of the loss without each neuron alone: (len(neurons),)."""
    masks = split(torch.ones_like(work.mask), work.sites)
    net = frozen(rewrite(work.model, work.sites, masks, on_weights=False), masks)
    images = in_channels_last(work.images)

    def loss() -> Tensor:
        return F.cross_entropy(logits_of(net(images)).float(), work.labels)

    before = loss()
    changes = []
    place = {site.offset + i: (number, i) for number, site in enumerate(work.sites) for i in range(site.neurons)}
    for neuron in neurons.tolist():
        number, entry = place[neuron]
        masks[number][entry] = 0.0
        changes.append(loss() - before)
        masks[number][entry] = 1.0
    return torch.stack(changes)


def plain_magnitude(weights: Sequence[Tensor]) -> Tensor:
    """(3, rows): L1, L2 and largest absolute value of every row of all weights."""
    norms = [
        torch.stack([weight.abs().sum(1), torch.linalg.vector_norm(weight, dim=1), weight.abs().amax(1)])
        for weight in weights
    ]
    return torch.cat(norms, 1)


def _saliency_error(work: Workload, how: Execution) -> float:
    """Of the Taylor and the Fisher term, against gradients picture by picture."""
    gradients = _each_gradient(work.model, work)
    taylor, fisher = saliency(work.model, work.sites, work.images, work.labels, how=how)
    return max(_error(taylor, gradients.mean(0)), _error(fisher, gradients.square().mean(0)))


def _each_gradient(model: nn.Module, work: Workload) -> Tensor:
    """(pictures, neurons): gradient of each picture's own loss at masks of one."""
    ones = torch.ones_like(work.mask)
    net = copy.deepcopy(model)
    each = [
        reference(net, work.sites, ones, image[None], label[None], batch_statistics=False)[1]
        for image, label in zip(work.images, work.labels, strict=True)
    ]
    return torch.stack(each)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def show(rows: Sequence[Row]) -> Any:
    """The rows of one architecture; the ratio is to the plain version."""
    columns = ["statistic", "provider", "ms", "20 %", "80 %", "x plain", "time of plain", "peak MB", "match"]
    plain = {row["quantity"]: row for row in rows if row["provider"] == "tuned_eager"}
    cells = [
        [
            row["quantity"],
            row["provider"],
            number(row["median_ms"]),
            number(row["p20_ms"]),
            number(row["p80_ms"]),
            ratio(plain[row["quantity"]], row, "median_ms"),
            ratio(row, plain[row["quantity"]], "median_ms"),
            number(row["peak_mb"]),
            verdict(row),
        ]
        for row in rows
    ]
    first = rows[0]
    title = f"statistics: {first['arch']}, batch {first['batch']}, {first['device']}, {first['threads']} threads"
    return table(title, columns, cells)


if __name__ == "__main__":
    sys.exit(main())
