"""Every op of mnp_fast.ops, forward and backward apart: time, and bandwidth as a share of that of a copy.

    python -m benchmarks.ops [--op NAME ...] [--dtype ...] [--threads N ...] [--compile] [--device ...] [--json [FILE]]

tuned_eager is the same in plain torch, torch_compile (with --compile) torch.compile of that. The bytes of an op are
what it has to read and write once, twice where statistics come first; "of copy" compares with `copy_` of a tensor whose
reading and writing move as many bytes, measured in turns with the op. On CUDA all are replayed as graphs, as a run does
it: launching a call from Python takes longer than most of these kernels. Values and gradients are compared with float64
before anything is timed; the exit status is 1 where one does not match. An op that this version lacks is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import options, results_file
from benchmarks.environment import environment
from benchmarks.tables import console, number, ratio, table, verdict
from benchmarks.timing import elapsed_ms, interleaved, summary
from mnp_fast import ops
from mnp_fast.memory import kept
from mnp_fast.replay import Recorder

Row = dict[str, Any]
Function = Callable[..., Any]

EPS = 1e-5
STEP = {"rate": 0.05, "decay": 0.9, "penalty": 2e-3}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01}
"""L2 norm of the difference from float64 over the norm of the float64 result, for every output and gradient."""
PLAIN_TOLERANCE = 0.1
"""The same of plain torch in bfloat16: it rounds before it adds the residual, so that some signs in front of a relu
differ. Seen is .04, and .0024 of mnp_fast."""
SAMPLE_MS = 3.0


@dataclass
class Case:
    """One op on one input.

    make: () -> arguments, differentiable ones with requires_grad. eager: the plain function of the same arguments.
    passes: how often forward and backward have to move the first argument, None where there is no backward; ``moved``:
    bytes of forward where that is not passes times its size. in_place: the op changes its first ``in_place`` arguments
    and these are its result.
    """

    op: str
    case: str
    shape: Sequence[int]
    memory: str
    dtype: torch.dtype
    make: Callable[[], list[Any]]
    eager: Function
    options: dict[str, Any] = field(default_factory=dict)
    passes: tuple[int, int | None] = (2, 3)
    moved: int | None = None
    in_place: int = 0


# ---------------------------------------------------------------- the table of ops
def cases(device: torch.device, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """Every op on shapes of ResNet-50 and ViT-B: a batch of 1, in cache, and of ``batch``, far beyond."""
    for n, c, s in ((1, 256, 56), (1, 512, 28), (batch, 64, 112), (batch, 256, 56), (batch, 2048, 7)):
        for memory in ("nchw", "channels_last"):
            yield from _maps((n, c, s, s), memory, dtype, device)
    for shape in ((1, 197, 768), (1, 197, 3072), (batch, 197, 768), (batch, 197, 3072)):
        yield from _tokens(shape, dtype, device)
    yield from _weights(device)


def _maps(shape: tuple[int, ...], memory: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def make(vectors: int, residual: bool) -> list[Any]:
        made = [_data(shape, memory, dtype, device)]
        # The mask takes a gradient; weights and statistics are frozen.
        made += [_vector(shape[1], device, grad=i == 0) for i in range(vectors)]
        return [*made, _data(shape, memory, dtype, device)] if residual else made

    for case, residual, act in (("", False, "none"), ("relu", False, "relu"), ("residual relu", True, "relu")):
        # Backward: gradient and x in, gradient of x out; with a residual also y in and its gradient out.
        forward, backward = (3, 5) if residual else (2, 3)
        common: dict[str, Any] = {"shape": shape, "memory": memory, "dtype": dtype}
        yield Case(
            "masked_affine",
            case,
            make=partial(make, 4, residual),
            eager=_eager_affine,
            options={"act": act},
            passes=(forward, backward),
            **common,
        )
        # Statistics first: x is read once more; backward reads all that it reads twice.
        yield Case(
            "masked_batch_norm",
            case,
            make=partial(make, 3, residual),
            eager=_eager_batch_norm,
            options={"act": act, "eps": EPS},
            passes=(forward + 1, backward + (3 if residual else 2)),
            **common,
        )


def _tokens(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def make(zeros: int) -> list[Any]:
        made = [_data(shape, "nchw", dtype, device), _vector(shape[-1], device, grad=True)]
        # Hidden units and heads: scale 1, center and shift 0.
        return made + [torch.full((shape[-1],), float(i == 0), device=device) for i in range(zeros)]

    common: dict[str, Any] = {"shape": shape, "memory": "(..., c)", "dtype": dtype}
    if shape[-1] != 3072:
        more = {"channel_dim": -1, "act": "none"}
        yield Case("masked_affine", "heads", make=partial(make, 3), eager=_eager_heads, options=more, **common)
        return
    for act in ("gelu", "gelu_tanh", "relu", "silu"):
        yield Case("masked_act", act, make=partial(make, 0), eager=_eager_act, options={"act": act}, **common)


def _weights(device: torch.device) -> Iterator[Case]:
    resnet = [(64, 147)] + [
        (rows, columns)
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3))
        for rows, columns in ((width, 4 * width), (width, 9 * width), (4 * width, width)) * blocks
    ]
    for case, shapes in (("resnet50", resnet), ("vit_b hidden", [(3072, 768)] * 12)):
        total = sum(rows * columns for rows, columns in shapes)
        yield Case(
            "channel_magnitude",
            case,
            (len(shapes), total),
            "rows",
            torch.float32,
            partial(_matrices, shapes, device),
            _eager_magnitude,
            passes=(1, None),
            moved=4 * total,
        )
    for case, neurons in (("resnet50", 26560), ("vit_b", 37776), ("beyond cache", 16_000_000)):
        yield Case(
            "mask_step_",
            case,
            (neurons,),
            "flat",
            torch.float32,
            partial(_flat, neurons, device),
            _eager_step_,
            dict(STEP),
            # mask, momentum, gradient, magnitude in; mask and momentum out.
            passes=(6, None),
            in_place=2,
        )


def _data(shape: Sequence[int], memory: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    order = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    return torch.randn(*shape, device=device).to(dtype, memory_format=order).requires_grad_()


def _matrices(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Any]:
    return [[torch.randn(shape, device=device) for shape in shapes]]


def _flat(neurons: int, device: torch.device) -> list[Any]:
    return [torch.rand(neurons, device=device) for _ in range(4)]


def _vector(n: int, device: torch.device, *, grad: bool) -> Tensor:
    return (0.5 + 0.5 * torch.rand(n, device=device)).requires_grad_(grad)


# ---------------------------------------------------------------- the same in plain torch
def _eager_affine(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    act: str,
) -> Tensor:
    # scale and center stand for gamma / sqrt(var + eps) and the running mean: var + eps is 1.
    y = F.batch_norm(x, center, torch.full_like(center, 1.0 - EPS), mask * scale, shift, False, 0.0, EPS)
    y = y if residual is None else y + residual
    return F.relu(y) if act == "relu" else y


def _eager_batch_norm(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float, act: str
) -> Tensor:
    y = F.batch_norm(x, None, None, mask * weight, bias, True, 0.0, eps)
    y = y if residual is None else y + residual
    return F.relu(y) if act == "relu" else y


def _eager_heads(x: Tensor, mask: Tensor, *others: Tensor, channel_dim: int, act: str) -> Tensor:
    return x * mask.to(x.dtype)


def _eager_act(x: Tensor, mask: Tensor, *, act: str) -> Tensor:
    activations: dict[str, Function] = {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }
    return activations[act](x) * mask.to(x.dtype)


def _eager_magnitude(weights: list[Tensor]) -> Tensor:
    norms = [
        torch.stack([weight.abs().sum(1), torch.linalg.vector_norm(weight, dim=1), weight.abs().amax(1)])
        for weight in weights
    ]
    return torch.cat(norms, 1)


def _eager_step_(
    mask: Tensor, momentum: Tensor, grad: Tensor, magnitude: Tensor, *, rate: float, decay: float, penalty: float
) -> None:
    momentum.mul_(decay).add_(grad).add_(magnitude, alpha=penalty)
    mask.sub_(rate * momentum).clamp_(0.0, 1.0)


# ---------------------------------------------------------------- measuring
def main() -> int:
    """Measure every op; 1 where one does not match."""
    parser = options.parser(__doc__, repeats=15)
    parser.add_argument("--op", action="append", help="repeatable (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="each in turn (default: 1 2)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of plain torch too")
    args = parser.parse_args()
    device = options.device_of(args)
    out = console()
    rows = []
    for threads in args.threads if device.type == "cpu" else args.threads[:1]:
        torch.set_num_threads(threads)
        rows += _measure_all(args, device, out)
    if not rows:
        raise SystemExit("none of the ops asked for is there")
    if args.json:
        used = environment(args.device, args.threads)
        out.print(f"written to {results_file.save(args.json, 'ops', used, rows)}")
    return 0 if all(row["match"] for row in rows) else 1


def _measure_all(args: argparse.Namespace, device: torch.device, out: Any) -> list[Row]:
    rows: list[Row] = []
    missing: dict[str, None] = {}
    for case in cases(device, options.DTYPES[args.dtype], args.batch):
        if args.op and case.op not in args.op:
            continue
        if not hasattr(ops, case.op):
            missing[case.op] = None
            continue
        rows += measure(case, device, args.repeats, compiled=args.compile)
    if rows:
        out.print(show(rows))
    for op in missing:
        out.print(f"{op} is left out: mnp_fast.ops has no such op")
    return rows


def measure(case: Case, device: torch.device, repeats: int, *, compiled: bool = False) -> list[Row]:
    """Rows of one case: forward, and backward where there is one, a row a provider."""
    functions: dict[str, Function] = {"tuned_eager": case.eager, "mnp_fast": getattr(ops, case.op)}
    if compiled:
        torch.compiler.reset()
        # The backward is called again and again on one graph.
        torch._functorch.config.donated_buffer = False
        functions["torch_compile"] = torch.compile(case.eager)
    torch.manual_seed(0)
    arguments = case.make()
    expected = _results(case, case.eager, _in_float64(arguments))
    checked, compile_s = {}, {}
    for name, function in functions.items():
        own = _fresh(case, arguments)
        compile_s[name] = elapsed_ms(partial(_results, case, function, own), device) / 1e3
        checked[name] = _errors(_results(case, function, _fresh(case, arguments)), expected)
    size = sum(t.nbytes for t in arguments[:1] if isinstance(t, Tensor))
    rows = []
    for direction, passes in zip(("forward", "backward"), case.passes, strict=True):
        if passes is None:
            continue
        moved = case.moved or passes * size
        # Written to first: memory that nobody has touched is one page of zeros, and a copy of it reads nothing.
        source, target = (torch.full((moved // 2,), i, dtype=torch.uint8, device=device) for i in range(2))
        calls: dict[str, Callable[[], Any]] = {"copy": _replayed(partial(partial, target.copy_, source), device)}
        for name, function in functions.items():
            calls[name] = _replayed(partial(_call, case, function, arguments, direction), device)
        # As in a run: freed memory is kept, or results beyond 32 MB cost fresh pages, five times the op itself.
        with kept():
            times = interleaved(calls, repeats, device, sample_ms=SAMPLE_MS)
        copy = summary(times["copy"])["median_ms"]
        for name in functions:
            row: Row = {"op": f"{case.op} {direction}" if case.passes[1] else case.op, "case": case.case}
            row |= {"shape": list(case.shape), "memory": case.memory, "dtype": str(case.dtype).removeprefix("torch.")}
            row |= {"device": device.type, "threads": torch.get_num_threads(), "provider": name}
            row |= summary(times[name]) | {"repeats": repeats, "bytes": moved, "copy_ms": copy}
            row |= {"gb_s": float(f"{moved / row['median_ms'] / 1e6:.4g}")}
            row |= {"of_copy": float(f"{copy / row['median_ms']:.3g}"), "error": checked[name]}
            narrow_plain = name != "mnp_fast" and case.dtype != torch.float32
            row["match"] = checked[name] <= (PLAIN_TOLERANCE if narrow_plain else TOLERANCE[case.dtype])
            if name == "torch_compile":
                row["compile_s"] = round(compile_s[name], 2)
            rows.append(row)
    return rows


def _call(case: Case, function: Function, arguments: list[Any], direction: str) -> Callable[[], Any]:
    if direction == "backward":
        own = _fresh(case, arguments)
        y = function(*own, **case.options)
        leaves = [t for t in own if isinstance(t, Tensor) and t.requires_grad]
        gradient = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True)
    # Detached: the forward alone, without what autograd adds.
    plain = [t.detach() if isinstance(t, Tensor) else t for t in arguments]

    def forward() -> None:
        with torch.no_grad():
            function(*plain, **case.options)

    return forward


def _replayed(make: Callable[[], Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """The call that ``make`` gives, on CUDA as a replay of its graph."""
    if device.type != "cuda":
        return make()
    recorder = Recorder(device)
    # What a backward starts from has to come from the stream that is captured.
    with recorder.beside():
        call = make()
        replay, _ = recorder.record(lambda: (call(),))
    return partial(_again, replay, call)


def _again(replay: Callable[[], Any], call: Callable[[], Any]) -> None:
    """call: holds what the graph reads."""
    replay()


def _fresh(case: Case, arguments: list[Any]) -> list[Any]:
    """Arguments that may be changed and differentiated."""
    return [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in arguments]


def _in_float64(arguments: list[Any]) -> list[Any]:
    return [
        t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else [w.double() for w in t]
        for t in arguments
    ]


def _results(case: Case, function: Function, arguments: list[Any]) -> list[Tensor]:
    """Output and all gradients, or the arguments that were changed; the gradient of the output is always the same."""
    y = function(*arguments, **case.options)
    if case.in_place:
        return [t.detach() for t in arguments[: case.in_place]]
    if case.passes[1] is None:
        return [y]
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(y.shape, generator=generator).to(y)
    leaves = [t for t in arguments if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def _errors(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of all outputs, L2; infinite where one is not finite."""
    errors = [
        float((one.double() - other).norm() / other.norm().clamp_min(1e-300))
        for one, other in zip(results, expected, strict=True)
    ]
    worst = max(errors) if all(error == error for error in errors) else float("inf")
    return float(f"{worst:.3g}")


def show(rows: Sequence[Row]) -> Any:
    """One line a row; speed-up over plain torch."""
    eager = {_key(row): row for row in rows if row["provider"] == "tuned_eager"}
    columns = ["op", "case", "shape", "memory", "provider", "ms", "20 %", "80 %", "x eager", "GB/s", "of copy", "match"]
    cells = [
        [
            row["op"],
            row["case"],
            "x".join(map(str, row["shape"])),
            row["memory"],
            row["provider"],
            number(row["median_ms"]),
            number(row["p20_ms"]),
            number(row["p80_ms"]),
            ratio(eager[_key(row)], row, "median_ms"),
            number(row["gb_s"]),
            f"{row['of_copy']:.2f}",
            verdict(row),
        ]
        for row in rows
    ]
    first = rows[0]
    return table(f"ops: {first['dtype']}, {first['device']}, {first['threads']} threads", columns, cells)


def _key(row: Row) -> tuple[Any, ...]:
    return (row["op"], row["case"], tuple(row["shape"]), row["memory"], row["dtype"], row["threads"])


if __name__ == "__main__":
    sys.exit(main())
