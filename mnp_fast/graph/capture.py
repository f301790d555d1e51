"""Traces a model, and says why where no trace can stand for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._sympy.numbers import int_oo

from mnp_fast.data import logits_of
from mnp_fast.graph.rewrite import program
from mnp_fast.graph.trace import Captured, Place
from mnp_fast.sites import Site, total_neurons, undisturbed

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
# A frozen product gives its result in the order of its input: what assumes a fixed one is not taken.
_KEPT_FREE = (aten.as_strided.default,)


def capture(model: nn.Module, sites: Sequence[Site], example: Tensor) -> Captured:
    """Trace ``model`` on pictures like ``example``, (b >= 2, ...) float32 on the model's device. Never raises.

    The trace holds no weights: it serves every copy of the model with the same sites. With the trial of logits and
    gradients it takes 3 to 4 s for ResNet-50 and 8 s for ViT-B/16, on two cores of an AMD EPYC.
    """
    # They stay on the model, around whatever its forward is, and would be in the trace besides.
    if any((model._forward_pre_hooks, model._forward_hooks, model._backward_pre_hooks, model._backward_hooks)):
        return Captured("the model itself has hooks")
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return Captured("its weights are not all float32")
    if len(example) < 2:
        return Captured("a trace needs two pictures")
    try:
        with undisturbed(model), torch.no_grad():
            exported = torch.export.export(
                _Logits(model), (example[:2].clone(),), strict=False, dynamic_shapes=({0: torch.export.Dim.AUTO},)
            )
    except Exception as error:  # whatever a stranger's forward does
        return Captured(f"torch.export: {_told(error)}")
    graph, signature = exported.graph, exported.graph_signature
    names, constants, reason = _inputs(exported)
    if reason is None and any(entry.kind != OutputKind.USER_OUTPUT for entry in signature.output_specs):
        reason = "the trace gives more than the logits"
    reason = reason or _unfit(graph)
    if reason is not None:
        return Captured(reason)
    size = (
        next(n for n in graph.nodes if n.op == "placeholder" and n.name in signature.user_inputs).meta["val"].shape[0]
    )
    if any(bool(limits.upper < int_oo) for limits in exported.range_constraints.values()):
        return Captured("its forward goes by how many pictures there are")
    places, reason = _places(model, sites, graph, names)
    if reason is not None:
        return Captured(reason)
    batch = size if isinstance(size, int) else None
    norms = _plain_norms(model, graph, names)
    captured = Captured(None, tuple(example.shape[1:]), batch, graph, names, constants, places, norms)
    # Another number than that of the trace: len(images) in a forward leaves the traced number in it.
    trial = example[:2] if batch is not None else torch.cat([example[:2], example[:1]])
    reason = _trial(captured, model, sites, trial)
    if reason is not None:
        return Captured(reason)
    return replace(captured, apart=batch is None and _apart(model, trial))


class _Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.net(images))


def _told(error: Exception) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _inputs(exported: torch.export.ExportedProgram) -> tuple[dict[str, str], dict[str, Tensor], str | None]:
    """(names, constants) as in Captured; with a reason where the trace needs anything else but the pictures."""
    names: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for entry in exported.graph_signature.input_specs:
        if entry.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert entry.target is not None
            names[entry.arg.name] = entry.target.removeprefix("net.")
        elif entry.kind == InputKind.CONSTANT_TENSOR and isinstance(exported.constants.get(str(entry.target)), Tensor):
            constants[entry.arg.name] = exported.constants[str(entry.target)]
        elif entry.kind != InputKind.USER_INPUT:
            return names, constants, f"the trace needs a {entry.kind.name.lower().replace('_', ' ')}"
    return names, constants, None


def _unfit(graph: fx.Graph) -> str | None:
    """Why the graph cannot be rewritten."""
    for node in graph.nodes:
        if any(written.op == "placeholder" for written in _written(node)):
            return "its forward changes buffers, weights or its input"
        if node.op == "call_function" and not (isinstance(node.target, torch._ops.OpOverload) or _of_sizes(node)):
            return f"the trace has {node.target}"
        if node.target in _KEPT_FREE:
            return f"the trace has {node.target}"
    return None


def _plain_norms(model: nn.Module, graph: fx.Graph, names: dict[str, str]) -> bool:
    """Whether all running statistics are those of torch's BatchNorm layers, and used as these use them."""
    layers = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)]
    own = {f"{layer}.running_mean".removeprefix(".") for layer in layers}
    means = {node for node in graph.nodes if node.op == "placeholder" and names.get(node.name) in own}
    norms = [node for node in graph.nodes if node.target == aten.batch_norm.default]
    used = {norm.args[3] for norm in norms if norm.args[3] is not None}
    return used <= means and all(user in norms for mean in means for user in mean.users)


def _trial(captured: Captured, model: nn.Module, sites: Sequence[Site], images: Tensor) -> str | None:
    """Why the trace cannot stand for the model, after a forward of both, and a backward of both without masks."""
    ones = torch.ones(total_neurons(sites), device=images.device)
    try:
        with undisturbed(model), torch.no_grad():
            expected = logits_of(model(images.clone()))
            found = program(captured, model, sites, ones, batch_statistics=False, dtype=None)(images)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            return "the trace gives other logits than the model"
        with undisturbed(model), torch.enable_grad():
            wanted = _gradients(model, model, images)
            traced = program(captured, model, sites, None, batch_statistics=False, dtype=None)
            given = _gradients(traced, model, images)
    except Exception as error:
        return f"the trace does not run: {_told(error)}"
    # A trace has the forward of an autograd.Function but not its backward, and no block without gradients.
    total = float(torch.stack([gradient.norm() for gradient in wanted]).norm())
    pairs = zip(given, wanted, strict=True)
    if all(float((a - b).norm()) <= 0.05 * float(b.norm()) + 1e-3 * total for a, b in pairs):
        return None
    return "the trace gives other gradients than the model"


def _gradients(run: Callable[[Tensor], Any], model: nn.Module, images: Tensor) -> list[Tensor]:
    """Of a sum of the logits, each with a weight of its own, to the images and the trainable weights; 0 for none."""
    images = images.clone().requires_grad_()
    to = [images, *(p for p in model.parameters() if p.requires_grad)]
    logits = logits_of(run(images.clone()))
    if not logits.requires_grad:
        return [torch.zeros_like(tensor) for tensor in to]
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    return list(torch.autograd.grad((logits * weights).sum(), to, allow_unused=True, materialize_grads=True))


def _apart(model: nn.Module, images: Tensor) -> bool:
    """Whether the first pictures have the logits that they have without the last one."""
    with undisturbed(model), torch.no_grad():
        alone, among = logits_of(model(images[:-1].clone())), logits_of(model(images.clone()))[:-1]
    return torch.allclose(alone, among, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    pairs = zip(node.target._schema.arguments, node.args, strict=False)
    return [x for a, x in pairs if isinstance(x, fx.Node) and a.alias_info is not None and a.alias_info.is_write]


def _of_sizes(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") in ("_operator", "math", "builtins", "torch")


def _places(
    model: nn.Module, sites: Sequence[Site], graph: fx.Graph, names: dict[str, str]
) -> tuple[tuple[tuple[Place, ...], ...], str | None]:
    """Where each site's parameter is used; with a reason where the trace cannot stand for the module level."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders = {id(parameters[name]): node for node, name in names.items() if name in parameters}
    nodes = {node.name: node for node in graph.nodes}
    found = []
    for site in sites:
        name = f"{site.path}.{site.parameter}" if site.path else site.parameter
        weight = nodes.get(holders.get(id(parameters[name]), ""))
        if weight is None or not weight.users:
            return (), f"the trace does not use {name}"
        places = [_place(site, weight, user) for user in weight.users]
        if site.kind == "conv" and not all(place.fused for place in places):
            return (), f"{name} is not a plain filter in the trace"
        found.append(tuple(places))
    return tuple(found), None


def _place(site: Site, weight: fx.Node, user: fx.Node) -> Place:
    argument = user.args.index(weight) if weight in user.args else -1
    expected: dict[str, tuple[tuple[Any, ...], int]] = {
        "batch_norm": ((aten.batch_norm.default,), 1),
        "conv": (_CONVOLUTIONS, 1),
        "mlp": ((aten.linear.default,), 1),
        "heads": ((aten.linear.default,), 1),
    }
    targets, position = expected[site.kind]
    return Place(user.name, argument, user.target in targets and argument == position)
