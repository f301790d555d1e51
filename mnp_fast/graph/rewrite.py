"""Rewrites a trace for one copy of its model: BatchNorm folded, masks and activations joined, products frozen."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mnp_fast.frozen import FrozenConv2d, FrozenLinear, attention
from mnp_fast.graph.layers import Act, Affine, BatchNorm, MaskedWeight, TrainedAffine
from mnp_fast.graph.program import Program
from mnp_fast.graph.region import Link, Region
from mnp_fast.graph.trace import Captured
from mnp_fast.sites import Site

aten = torch.ops.aten

_RELU = (aten.relu.default, aten.relu_.default)
_ADD = (aten.add.Tensor, aten.add_.Tensor)
_DROPOUT = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)
# A frozen product gives its result in the order of its input: views that assume a fixed one are let go.
_VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


def program(
    captured: Captured,
    model: nn.Module,
    sites: Sequence[Site],
    mask: Tensor | None,
    *,
    batch_statistics: bool,
    dtype: torch.dtype | None,
    packed: bool = True,
    joined: bool = True,
) -> Program:
    """A function of images that runs the trace with the weights of ``model``; returns logits (b, classes).

    mask: (total_neurons(sites),) float32, read in every call; None for no masks and trainable weights. With a mask
    every weight is taken as it is now. dtype: that of products (convolutions, linear layers, attention),
    torch.bfloat16 or None for float32. packed: False where it is run once or twice, which does not repay putting the
    weights of convolutions into oneDNN's order. joined: False where the nodes are walked one by one (`mnp_fast.walk`):
    every convolution is a region of its own. On a CPU pictures that do not depend on each other are shared out to
    one thread a core.
    """
    assert captured.graph is not None
    assert captured.names is not None
    return _Rewriter(captured, model, sites, mask, batch_statistics, dtype, packed, joined).run()


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
        joined: bool,
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
        self.packed, self.joined = packed, joined
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
            self._gather()
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
            independent=not self.meet and self.captured.apart,
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
        product = self._call(node, MaskedWeight(self._mask(i), self.sites[i]), weight)
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
        self._fuse(stand_in, lambda act: Affine(mask, ones, zeros, shift, act))

    def _masked_input(self, node: fx.Node, i: int) -> None:
        """Hidden units or heads in front of a linear layer; an activation just before them is part of the op."""
        site, x = self.sites[i], node.args[0]
        assert isinstance(x, fx.Node)
        act = _activation(x)
        if act is not None and _only_user(x) is not None and site.repeat == 1:
            self._replace(x, self._call(x, Act(self._mask(i), act), x.args[0]))
            return
        ones = torch.ones(site.neurons * site.repeat, device=next(iter(self.values.values())).device)
        zeros = torch.zeros_like(ones)
        affine = Affine(self._mask(i), ones, zeros, zeros, "none", -1, site.repeat)
        node.update_arg(0, self._call(node, affine, x))

    def _batch_norm(self, node: fx.Node, site: int | None) -> None:
        _, weight, bias, mean, var, _, _, eps, _ = node.args
        gamma, beta, running_mean, running_var = (self._value(v) for v in (weight, bias, mean, var))
        batch = self.batch_statistics or running_mean is None
        self.meet = self.meet or batch
        if gamma is not None and bias is None:
            beta = torch.zeros_like(gamma.detach())
        if gamma is None or beta is None or (running_var is None and not batch):
            if batch:
                node.args = (*node.args[:3], None, None, True, *node.args[6:])
            return
        mask = None if site is None else self._mask(site)
        if batch:
            self._fuse(node, lambda act: BatchNorm(mask, gamma, beta, float(eps), act))  # type: ignore[arg-type]
            return
        assert running_mean is not None
        assert running_var is not None
        statistics = (running_mean, running_var, float(eps))  # type: ignore[arg-type]
        if self.mask is None:
            self._fuse(node, lambda act: TrainedAffine(gamma, beta, *statistics, act))
            return
        scale = gamma.detach() * torch.rsqrt(running_var + float(eps))  # type: ignore[arg-type]
        shift, center = beta.detach().clone(), running_mean.clone()
        self._fuse(node, lambda act: Affine(mask, scale, center, shift, act))

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

    def _gather(self) -> None:
        """Convolutions with an affine behind them, and whatever of that kind follows directly, as one function."""
        run: list[tuple[fx.Node, fx.Node]] = []
        for node in list(self.graph.nodes):
            if node.op == "get_attr":
                continue
            conv = self._convolution_of(node)
            if conv is not None:
                run.append((conv, node))
                if not self.joined:
                    self._region(run)
                    run = []
            elif not (isinstance(self._module(node), FrozenConv2d) and self._affine_of(node) is not None):
                self._region(run)
                run = []

    def _affine_of(self, conv: fx.Node) -> fx.Node | None:
        """The affine that alone takes what a convolution gives."""
        user = _only_user(conv)
        affine = None if user is None else self._module(user)
        fits = isinstance(affine, Affine) and affine.channel_dim == 1 and user is not None and user.args[0] is conv
        return user if fits and conv not in user.args[1:] else None  # type: ignore[union-attr]

    def _convolution_of(self, node: fx.Node) -> fx.Node | None:
        x = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or not isinstance(self._module(x), FrozenConv2d):
            return None
        return x if self._affine_of(x) is node else None

    def _region(self, run: list[tuple[fx.Node, fx.Node]]) -> None:
        if not run:
            return
        run = self._shortcuts_first(run)
        nodes = [node for _, node in run]
        values: dict[fx.Node, int] = {}
        for conv, node in run:
            for x in (conv.args[0], *node.args[1:]):
                if x not in nodes:
                    values.setdefault(x, len(values))  # type: ignore[arg-type]
        inputs = list(values)
        links = []
        for conv, node in run:
            residual = values[node.args[1]] if len(node.args) > 1 else None  # type: ignore[index]
            links.append(Link(self._module(conv), self._module(node), values[conv.args[0]], residual))  # type: ignore[index]
            values[node] = len(values)
        inside = {node for pair in run for node in pair}
        outputs = [node for node in nodes if not set(node.users) <= inside]
        region = self._call(nodes[-1], Region(links, len(inputs), [values[node] for node in outputs]), *inputs)
        for i, node in enumerate(outputs):
            found = region
            if len(outputs) > 1:
                with self.graph.inserting_before(nodes[-1]):
                    found = self.graph.call_function(operator.getitem, (region, i))
            found.meta = dict(node.meta)
            node.replace_all_uses_with(found)
        for conv, node in reversed(run):
            self.graph.erase_node(node)
            self.graph.erase_node(conv)

    def _shortcuts_first(self, run: list[tuple[fx.Node, fx.Node]]) -> list[tuple[fx.Node, fx.Node]]:
        """1x1 convolutions that skip positions directly behind what they take.

        So their gradient comes last, onto a whole one, in place of one that is zero at the positions between.
        """
        ordered: list[tuple[fx.Node, fx.Node]] = []
        for conv, node in run:
            module, place = self._module(conv), len(ordered)
            if module.kernel == [1, 1] and module.stride != [1, 1] and len(node.args) == 1:
                place = next((i for i in range(place, 0, -1) if ordered[i - 1][1] is conv.args[0]), 0)
            ordered.insert(place, (conv, node))
        return ordered

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
