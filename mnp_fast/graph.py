"""The graph level: a captured forward in which affine, mask, residual and activation are one op.

`capture` traces a model once with torch.export; `Captured.program` rewrites the trace for one copy of that model. The
numbers are those of the module level (`mnp_fast.masked`), which also runs whatever cannot be captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.export.graph_signature import InputKind, OutputKind

from mnp_fast import workers
from mnp_fast.data import logits_of
from mnp_fast.frozen import FrozenConv2d, FrozenLinear, attention
from mnp_fast.ops import masked_act, masked_affine, masked_batch_norm, op_masked_affine, samples
from mnp_fast.sites import Site, columns, total_neurons, undisturbed

aten = torch.ops.aten

_RELU = (aten.relu.default, aten.relu_.default)
_ADD = (aten.add.Tensor, aten.add_.Tensor)
_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
_DROPOUT = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)
# What a fixed order of memory is assumed of: a frozen product gives its result in the order of its input.
_VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
_KEPT_FREE = (aten.as_strided.default,)


@dataclass(frozen=True)
class Captured:
    """A traced model, or the reason that there is none.

    graph: the trace, with a placeholder for every weight; names: placeholder to the name of parameter or buffer;
    constants: placeholder to tensor. batch: None where any number of pictures from two on can be given.
    """

    reason: str | None
    shape: tuple[int, ...] = ()
    batch: int | None = None
    graph: fx.Graph | None = None
    names: dict[str, str] | None = None
    constants: dict[str, Tensor] | None = None
    places: tuple[tuple[_Place, ...], ...] = ()

    def takes(self, images: Any) -> bool:
        """Whether the trace stands for a forward of these images."""
        return (
            self.graph is not None
            and isinstance(images, Tensor)
            and images.dtype == torch.float32
            and tuple(images.shape[1:]) == self.shape
            and (len(images) > 1 if self.batch is None else len(images) == self.batch)
        )


@dataclass(frozen=True)
class _Place:
    """A node where a site's parameter is used. ``fused``: as the op that the kind of the site expects."""

    node: str
    argument: int
    fused: bool


# ---------------------------------------------------------------- capture
def capture(model: nn.Module, sites: Sequence[Site], example: Tensor) -> Captured:
    """Trace ``model`` on pictures like ``example``, (b >= 2, ...) float32 on the model's device. Never raises.

    The trace holds no weights: it serves every copy of the model with the same sites. Takes 1 to 2 s for ResNet-50 and
    ViT-B/16, whatever the size of the pictures.
    """
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return Captured("its weights are not all float32")
    if len(example) < 2:
        return Captured("a trace needs two pictures")
    try:
        with undisturbed(model), torch.no_grad():
            program = torch.export.export(
                _Logits(model), (example[:2],), strict=False, dynamic_shapes=({0: torch.export.Dim.AUTO},)
            )
    except Exception as error:  # whatever a stranger's forward does
        lines = str(error).strip().splitlines()
        return Captured(f"torch.export: {type(error).__name__}: {lines[0][:200] if lines else ''}")
    graph, signature = program.graph, program.graph_signature
    names: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for entry in signature.input_specs:
        if entry.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert entry.target is not None
            names[entry.arg.name] = entry.target.removeprefix("net.")
        elif entry.kind == InputKind.CONSTANT_TENSOR and isinstance(program.constants.get(str(entry.target)), Tensor):
            constants[entry.arg.name] = program.constants[str(entry.target)]
        elif entry.kind != InputKind.USER_INPUT:
            return Captured(f"the trace needs a {entry.kind.name.lower().replace('_', ' ')}")
    if any(entry.kind != OutputKind.USER_OUTPUT for entry in signature.output_specs):
        return Captured("the trace gives more than the logits")
    for node in graph.nodes:
        if any(written.op == "placeholder" for written in _written(node)):
            return Captured("its forward changes buffers, weights or its input")
        if node.op == "call_function" and not (isinstance(node.target, torch._ops.OpOverload) or _of_sizes(node)):
            return Captured(f"the trace has {node.target}")
        if node.target in _KEPT_FREE:
            return Captured(f"the trace has {node.target}")
    size = (
        next(n for n in graph.nodes if n.op == "placeholder" and n.name in signature.user_inputs).meta["val"].shape[0]
    )
    places, reason = _places(model, sites, graph, names)
    if reason is not None:
        return Captured(reason)
    batch = size if isinstance(size, int) else None
    captured = Captured(None, tuple(example.shape[1:]), batch, graph, names, constants, places)
    # Another number than that of the trace: len(images) in a forward leaves the traced number in it.
    trial = example[:2] if batch is not None else torch.cat([example[:2], example[:1]])
    reason = _trial(captured, model, sites, trial)
    return captured if reason is None else Captured(reason)


def _trial(captured: Captured, model: nn.Module, sites: Sequence[Site], images: Tensor) -> str | None:
    """Why the trace cannot stand for the model, after a forward of both."""
    ones = torch.ones(total_neurons(sites), device=images.device)
    try:
        with undisturbed(model), torch.no_grad():
            expected = logits_of(model(images))
            found = program(captured, model, sites, ones, batch_statistics=False, dtype=None)(images)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"the trace does not run: {type(error).__name__}: {lines[0][:200] if lines else ''}"
    if torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        return None
    return "the trace gives other logits than the model"


class _Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.net(images))


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
) -> tuple[tuple[tuple[_Place, ...], ...], str | None]:
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


def _place(site: Site, weight: fx.Node, user: fx.Node) -> _Place:
    argument = user.args.index(weight) if weight in user.args else -1
    expected: dict[str, tuple[tuple[Any, ...], int]] = {
        "batch_norm": ((aten.batch_norm.default,), 1),
        "conv": (_CONVOLUTIONS, 1),
        "mlp": ((aten.linear.default,), 1),
        "heads": ((aten.linear.default,), 1),
    }
    targets, position = expected[site.kind]
    return _Place(user.name, argument, user.target in targets and argument == position)


# ---------------------------------------------------------------- program
def program(
    captured: Captured,
    model: nn.Module,
    sites: Sequence[Site],
    mask: Tensor | None,
    *,
    batch_statistics: bool,
    dtype: torch.dtype | None,
    packed: bool = True,
) -> Program:
    """A function of images that runs the trace with the weights of ``model``; returns logits (b, classes).

    mask: (total_neurons(sites),) float32, read in every call; None for no masks and trainable weights. With a mask
    every weight is taken as it is now. dtype: that of products (convolutions, linear layers, attention),
    torch.bfloat16 or None for float32. packed: False where it is run once or twice, which does not repay putting the
    weights of convolutions into oneDNN's order. On a CPU pictures that do not depend on each other are shared out to
    one thread a core.
    """
    assert captured.graph is not None
    assert captured.names is not None
    return _Rewriter(captured, model, sites, mask, batch_statistics, dtype, packed).run()


class _Rewriter:
    def __init__(
        self,
        captured: Captured,
        model: nn.Module,
        sites: Sequence[Site],
        mask: Tensor | None,
        batch_statistics: bool,
        dtype: torch.dtype | None,
        packed: bool,
    ) -> None:
        self.graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = self.graph.graph_copy(captured.graph, values)  # type: ignore[arg-type]
        assert isinstance(output, list | tuple)
        self.graph.output(output[0])
        self.nodes = {old.name: new for old, new in values.items()}
        self.sites, self.mask, self.batch_statistics = sites, mask, batch_statistics
        self.meet = batch_statistics  # pictures, in the statistics of a batch
        self.views = threading.local()  # of the mask, in the forward that runs in this thread
        self.dtype = dtype or torch.float32
        self.low = dtype is not None
        self.packed = packed
        self.root: dict[str, Any] = {}
        self.values: dict[fx.Node, Tensor] = {}  # what weight nodes stand for
        self.captured = captured
        self.modules: dict[tuple[Any, ...], nn.Module] = {}
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        for name, target in (captured.names or {}).items():
            self._attribute(self.nodes[name], tensors[target])
        for name, constant in (captured.constants or {}).items():
            self._attribute(self.nodes[name], constant)

    def run(self) -> Program:
        self._simplify()
        normalised: dict[fx.Node, int | None] = {}
        for i, places in enumerate(self.captured.places if self.mask is not None else ()):
            for place in places:
                node = self.nodes[place.node]
                kind = self.sites[i].kind
                if not place.fused:
                    self._swap(node, place.argument, i)
                elif kind == "batch_norm":
                    normalised[node] = i
                elif kind == "conv":
                    self._masked_output(node, i)
                else:
                    self._masked_input(node, i)
        for node in list(self.graph.nodes):
            if node.target == aten.batch_norm.default:
                self._batch_norm(node, normalised.get(node))
        if self.mask is not None:
            for node in list(self.graph.nodes):
                self._freeze(node)
            for node in list(self.graph.nodes):
                self._join(node)
        module = fx.GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        device = next(iter(self.values.values())).device.type
        return Program(
            module,
            self.views,
            [site.neurons for site in self.sites],
            self.mask,
            device,
            self.dtype if self.low else None,
            independent=not self.meet and self.captured.batch is None,
        )

    # ------------------------------------------------------------ nodes and what they stand for
    def _attribute(self, placeholder: fx.Node, tensor: Tensor) -> None:
        name = f"w{len(self.values)}"
        self.root[name] = tensor
        with self.graph.inserting_before(placeholder):
            node = self.graph.get_attr(name)
        node.meta = dict(placeholder.meta)
        placeholder.replace_all_uses_with(node)
        self.graph.erase_node(placeholder)
        self.values[node] = tensor

    def _call(self, before: fx.Node, module: nn.Module, *args: Any) -> fx.Node:
        name = f"op{len(self.root)}"
        self.root[name] = module
        with self.graph.inserting_before(before):
            return self.graph.call_module(name, args)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _simplify(self) -> None:
        for node in list(self.graph.nodes):
            if node.target in _VIEWS:
                node.target = _VIEWS[node.target]
            elif node.target in _DROPOUT and node.args[2] is False:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _value(self, argument: Any) -> Tensor | None:
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def _tail(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None, str]:
        """What follows a normalisation: (last node, residual, activation) of node [+ residual] [relu]."""
        last, residual, act = node, None, "none"
        user = _only_user(last)
        if user is not None and user.target in _ADD and not user.kwargs and len(user.args) == 2:
            others = [x for x in user.args if x is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node) and _alike(others[0], node):
                last, residual = user, others[0]
                user = _only_user(last)
        if user is not None and user.target in _RELU:
            last, act = user, "relu"
        return last, residual, act

    def _fuse(self, node: fx.Node, module: Callable[[str], nn.Module]) -> None:
        """Put ``module(act)(x, residual)`` in the place of node, the sum and the relu behind it."""
        last, residual, act = self._tail(node)
        x = node.args[0]
        new = self._call(last, module(act), x, *([] if residual is None else [residual]))
        chain = [last]
        while chain[-1] is not node:
            chain.append(next(a for a in chain[-1].args if isinstance(a, fx.Node) and a is not residual))
        self._replace(last, new)
        for gone in chain[1:]:
            self.graph.erase_node(gone)

    # ------------------------------------------------------------ sites
    def _mask(self, i: int) -> Callable[[], Tensor]:
        views = self.views
        return lambda: views.of[i]

    def _swap(self, node: fx.Node, argument: int, i: int) -> None:
        """The parameter times its mask, where it is used in another way than its kind expects."""
        weight = node.args[argument]
        assert isinstance(weight, fx.Node)
        product = self._call(node, _MaskedWeight(self._mask(i), self.sites[i]), weight)
        node.update_arg(argument, product)

    def _masked_output(self, node: fx.Node, i: int) -> None:
        """mask * (conv(x) without bias) + bias, then what follows."""
        bias = self._value(node.args[2]) if len(node.args) > 2 else None
        node.args = (*node.args[:2], None, *node.args[3:])
        ones = torch.ones(self.sites[i].neurons, device=next(iter(self.values.values())).device)
        shift = torch.zeros_like(ones) if bias is None else bias.detach()
        with self.graph.inserting_after(node):
            # Stands for the masked output until _fuse takes it.
            stand_in = self.graph.call_function(aten.clone.default, (node,))
        stand_in.meta = dict(node.meta)
        node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user is not stand_in)
        mask = self._mask(i)
        zeros = torch.zeros_like(ones)
        self._fuse(stand_in, lambda act: _Affine(mask, ones, zeros, shift, act))

    def _masked_input(self, node: fx.Node, i: int) -> None:
        """Hidden units or heads in front of a linear layer; an activation just before them is part of the op."""
        site, x = self.sites[i], node.args[0]
        assert isinstance(x, fx.Node)
        act = _activation(x)
        if act is not None and _only_user(x) is not None and site.repeat == 1:
            self._replace(x, self._call(x, _Act(self._mask(i), act), x.args[0]))
            return
        ones = torch.ones(site.neurons * site.repeat, device=next(iter(self.values.values())).device)
        zeros = torch.zeros_like(ones)
        affine = _Affine(self._mask(i), ones, zeros, zeros, "none", -1, site.repeat)
        node.update_arg(0, self._call(node, affine, x))

    def _batch_norm(self, node: fx.Node, site: int | None) -> None:
        _, weight, bias, mean, var, _, _, eps, _ = node.args
        gamma, beta, running_mean, running_var = (self._value(v) for v in (weight, bias, mean, var))
        batch = self.batch_statistics or running_mean is None
        self.meet = self.meet or batch
        if gamma is None or beta is None or (running_var is None and not batch):
            if batch:
                node.args = (*node.args[:3], None, None, True, *node.args[6:])
            return
        mask = None if site is None else self._mask(site)
        if batch:
            self._fuse(node, lambda act: _BatchNorm(mask, gamma, beta, float(eps), act))  # type: ignore[arg-type]
            return
        assert running_mean is not None
        assert running_var is not None
        statistics = (running_mean, running_var, float(eps))  # type: ignore[arg-type]
        if self.mask is None:
            self._fuse(node, lambda act: _TrainedAffine(gamma, beta, *statistics, act))
            return
        scale = gamma.detach() * torch.rsqrt(running_var + float(eps))  # type: ignore[arg-type]
        shift, center = beta.detach().clone(), running_mean.clone()
        self._fuse(node, lambda act: _Affine(mask, scale, center, shift, act))

    # ------------------------------------------------------------ frozen products
    def _freeze(self, node: fx.Node) -> None:
        if node.target == aten.scaled_dot_product_attention.default:
            if len(node.args) == 3 and set(node.kwargs) <= {"scale"}:
                node.target = attention
            return
        if node.target not in (aten.conv2d.default, aten.linear.default):
            return
        weight = self._value(node.args[1])
        bias = self._value(node.args[2]) if len(node.args) > 2 else None
        if weight is None or (len(node.args) > 2 and node.args[2] is not None and bias is None):
            return
        rest: list[Any] = [(1, 1), (0, 0), (1, 1), 1] if node.target == aten.conv2d.default else []
        given = node.args[3:]
        rest[: len(given)] = [tuple(v) * (2 // len(v)) if isinstance(v, list | tuple) else v for v in given]
        key = (node.target, id(weight), id(bias), *rest)
        if key not in self.modules:
            kind = FrozenConv2d if node.target == aten.conv2d.default else FrozenLinear
            self.modules[key] = frozen = kind(weight.to(self.dtype), bias, *rest)
            if isinstance(frozen, FrozenConv2d):
                frozen.packs = frozen.packs and self.packed
        self._replace(node, self._call(node, self.modules[key], node.args[0]))

    def _join(self, node: fx.Node) -> None:
        """A convolution and the op behind it as one function, which halves the calls of a forward and a backward."""
        affine, x = self._module(node), node.args[0] if node.args else None
        if not isinstance(affine, _Affine) or affine.channel_dim != 1 or not isinstance(x, fx.Node):
            return
        conv = self._module(x)
        if isinstance(conv, FrozenConv2d) and _only_user(x) is node:
            self._replace(node, self._call(node, _ConvolutionAffine(conv, affine), *x.args, *node.args[1:]))
            self.graph.erase_node(x)

    def _module(self, node: fx.Node) -> Any:
        return self.root[str(node.target)] if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    first, second = a.meta.get("val"), b.meta.get("val")
    return isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape


def _activation(node: fx.Node) -> str | None:
    if node.target in _RELU:
        return "relu"
    if node.target in (aten.silu.default, aten.silu_.default):
        return "silu"
    if node.target == aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}[str(node.kwargs.get("approximate", "none"))]
    return None


# ---------------------------------------------------------------- what runs in the place of nodes
def products_in(dtype: torch.dtype | None, device: str) -> AbstractContextManager[Any]:
    """Autocast to ``dtype``; with None whatever the caller has set."""
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


class Program:
    """A trace with the weights of a model, as a function of images.

    module: what runs; views.of: the masks of the sites, in the thread that runs. independent: no picture's logits
    depend on another picture, and any number of them from two on can be given.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        views: threading.local,
        sizes: list[int],
        mask: Tensor | None,
        device: str,
        dtype: torch.dtype | None,
        independent: bool,
    ) -> None:
        self.module, self.views, self.sizes, self.mask = module, views, sizes, mask
        self.device, self.dtype, self.independent = device, dtype, independent

    def __call__(self, images: Tensor) -> Tensor:
        parts = self.parts(images)
        if parts < 2 or self.mask is None:
            return self.run(images, self.mask)
        chunks = images.tensor_split(parts)
        if torch.is_grad_enabled() and self.mask.requires_grad:
            logits: Tensor = _Apart.apply(self, chunks, self.mask)
            return logits
        return torch.cat(workers.side_by_side([partial(self.run, chunk, self.mask) for chunk in chunks]))

    def parts(self, images: Tensor) -> int:
        """How many chunks of these images run side by side. A trace needs two pictures."""
        # With weight gradients it costs more than it gives: ResNet-50, batch 8, 820 ms a step against 470 ms.
        apart = self.independent and self.device == "cpu" and self.mask is not None
        return min(workers.threads(), len(images) // 2) if apart else 1

    def run(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of the images in this thread alone."""
        if mask is not None:
            # One split a forward: its backward is one cat, and the gradient of the mask is one tensor.
            self.views.of = samples.split(mask, self.sizes)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with products_in(self.dtype, self.device):
            logits: Tensor = self.module(images)
        return logits


class _Apart(torch.autograd.Function):
    """Forward and backward of several chunks of pictures side by side."""

    @staticmethod
    def forward(ctx: Any, whole: Program, chunks: Sequence[Tensor], mask: Tensor) -> Tensor:
        def piece(chunk: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                own = mask.detach().requires_grad_()
                return whole.run(chunk, own), own

        ctx.parts = workers.side_by_side([partial(piece, chunk) for chunk in chunks])
        return torch.cat([logits.detach() for logits, _ in ctx.parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        parts, ctx.parts = ctx.parts, None

        def piece(part: tuple[Tensor, Tensor], grad: Tensor) -> Tensor:
            logits, own = part
            return torch.autograd.grad(logits, own, grad)[0]

        grads = grad.split([len(logits) for logits, _ in parts])
        first, *others = workers.side_by_side([partial(piece, *both) for both in zip(parts, grads, strict=True)])
        for other in others:
            first += other
        return None, None, first


class _Affine(nn.Module):
    def __init__(
        self,
        mask: Callable[[], Tensor] | None,
        scale: Tensor,
        center: Tensor,
        shift: Tensor,
        act: str,
        channel_dim: int = 1,
        repeat: int = 1,
    ) -> None:
        super().__init__()
        ones = torch.ones_like(scale)
        self.mask = mask or (lambda: ones)
        self.vectors = (scale, center, shift)
        self.act, self.channel_dim, self.repeat = act, channel_dim, repeat

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        mask = samples.repeated(self.mask(), self.repeat)
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        return masked_affine(x, mask, *self.vectors, residual, channel_dim=self.channel_dim, act=self.act)


class _ConvolutionAffine(nn.Module):
    def __init__(self, conv: FrozenConv2d, affine: _Affine) -> None:
        super().__init__()
        self.conv, self.affine = conv, affine

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.to(self.conv.dtype).contiguous(memory_format=torch.channels_last)
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        y: Tensor = _JoinedConvolution.apply(x, self.affine.mask(), *self.affine.vectors, residual, self)
        return y


class _JoinedConvolution(torch.autograd.Function):
    """FrozenConv2d, then masked_affine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        *tensors, layer = args
        inputs = (layer.conv.run(x), *tensors, 1, layer.affine.act)
        y: Tensor = op_masked_affine.run(*inputs)
        op_masked_affine.save(ctx, inputs, y)
        ctx.conv, ctx.shape = layer.conv, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = op_masked_affine.gradients(op_masked_affine.run_backward, ctx, grad)[:6]
        return None if first is None else ctx.conv.back(first, ctx.shape), *others, None


class _TrainedAffine(nn.Module):
    """BatchNorm with running statistics whose gamma and beta are being trained."""

    def __init__(self, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, act: str) -> None:
        super().__init__()
        self.weights = (gamma, beta)
        self.center, self.rstd, self.ones, self.act = mean.clone(), torch.rsqrt(var + eps), torch.ones_like(mean), act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gamma, beta = self.weights
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        return masked_affine(x, gamma, self.rstd, self.center, beta, residual, act=self.act)


class _BatchNorm(nn.Module):
    """BatchNorm with the statistics of the batch; its gamma and beta are trained where nothing is masked."""

    def __init__(self, mask: Callable[[], Tensor] | None, gamma: Tensor, beta: Tensor, eps: float, act: str) -> None:
        super().__init__()
        ones = torch.ones_like(gamma)
        self.mask = mask or (lambda: ones)
        self.weights, self.eps, self.act = (gamma, beta), eps, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        return masked_batch_norm(x, self.mask(), *self.weights, residual, eps=self.eps, act=self.act)


class _Act(nn.Module):
    def __init__(self, mask: Callable[[], Tensor], act: str) -> None:
        super().__init__()
        self.mask, self.act = mask, act

    def forward(self, x: Tensor) -> Tensor:
        return masked_act(x, self.mask(), act=self.act)


class _MaskedWeight(nn.Module):
    def __init__(self, mask: Callable[[], Tensor], site: Site) -> None:
        super().__init__()
        self.mask, self.site = mask, site

    def forward(self, weight: Tensor) -> Tensor:
        return weight * columns(self.site, self.mask())
