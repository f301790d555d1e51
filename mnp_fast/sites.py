"""Where the neurons of any nn.Module are: one traced forward, no list of known architectures.

Masks are per branch: two branches that are added into one residual stream have their own masks, as ANP and RNP do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from mnp_fast.errors import ConfigError, ModelError
from mnp_fast.provenance import Call, Maker, Part, Provenance, Tag, rows_along, tensors

_LAYERS = {"linear": "linear", "batch_norm": "batch_norm"} | {
    f"conv{transposed}{n}d": "conv" for transposed in ("", "_transpose") for n in (1, 2, 3)
}


@dataclass(frozen=True)
class Source:
    """Weights that make the neurons of a site: rows (output channels) of one parameter.

    ``rows`` holds k entries a neuron, those of neuron 0 first; ``path`` is the module, ``parameter`` the name in it.
    """

    path: str
    parameter: str
    rows: Sequence[int] = field(repr=False)


@dataclass(frozen=True)
class Site:
    """One place where a vector of masks multiplies.

    path: module whose output (batch_norm, conv) or input (mlp, heads) is multiplied.
    kind: "batch_norm" | "conv" | "mlp" | "heads".
    neurons: length of the mask vector; offset: its first entry in the flat mask.
    sources: the weights that the magnitude is computed from; empty if not known.
    repeat: input columns a neuron owns; neuron i owns i * repeat to (i + 1) * repeat (mlp: 1, heads: head_dim).
    parameter: the parameter of ``path`` that pruning sets to zero.
    functional: the parameter is used without calling the module (as nn.MultiheadAttention does), so it is the weight
        and not the module that a mask multiplies.
    """

    path: str
    kind: str
    neurons: int
    offset: int
    sources: tuple[Source, ...] = ()
    repeat: int = 1
    parameter: str = "weight"
    functional: bool = False


def total_neurons(sites: Sequence[Site]) -> int:
    """Length of the flat mask."""
    return sum(site.neurons for site in sites)


def find_sites(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """The sites of ``model`` that are reached by ``model(example)``, in execution order.

    example: a batch as the model takes it; the first two pictures are used. The forward runs in eval mode without
    gradients; training flags, hooks, buffers and random state come back as they were.

    batch_norm: every affine BatchNorm. conv: every convolution whose channels do not all go straight into a BatchNorm
    site. mlp: hidden units between two linear layers with an activation between. heads: attention heads in front of a
    linear output projection. A layer whose rows are the model's own logits is no site: its neurons are classes.

    Raises ModelError if the model cannot run on ``example`` or has no site.
    """
    _check(model)
    finder = _Finder(model)
    with undisturbed(model), finder.hooks(), torch.no_grad():
        try:
            with finder:
                output = model(example[:2].clone())
        except Exception as error:
            raise ModelError(
                f"the model cannot run on an input of shape {tuple(example.shape)} and dtype {example.dtype}: {error}. "
                "Pass a batch of pictures preprocessed as the model expects, on the model's device."
            ) from error
        found = finder.sites(output)
    if not found:
        raise ModelError(
            "the model has nothing to prune: no BatchNorm, convolution, MLP or attention head with plain weights was "
            "reached in its forward. Pass the network itself, in floating point."
        )
    offset, placed = 0, []
    for site in found:
        placed.append(replace(site, offset=offset))
        offset += site.neurons
    return tuple(placed)


def site_names(sites: Sequence[Site]) -> list[str]:
    """A name for each site: its path, with the parameter where one path has several or is the model itself."""
    paths = [site.path for site in sites]
    several = [paths.count(path) > 1 or not path for path in paths]
    return [
        f"{site.path}.{site.parameter}".lstrip(".") if more else site.path
        for site, more in zip(sites, several, strict=True)
    ]


def site_parameter(model: nn.Module, path: str, name: str) -> tuple[nn.Module, nn.Parameter]:
    """A site's or source's module and parameter. Raises ConfigError if the sites are those of another model."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    weight = module._parameters.get(name)
    if weight is None:
        raise ConfigError(f"the model has no {path}.{name}: find the sites of this very model again.")
    return module, weight


def columns(site: Site, vector: Tensor) -> Tensor:
    """``vector`` (neurons,) as a vector of the input columns (mlp, heads) or channels (batch_norm) of the site."""
    return vector if site.repeat == 1 else vector.repeat_interleave(site.repeat)


def _check(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(f"{name} has no values yet: run the model once on a batch, then load its weights.")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{path or 'the model'} is TorchScript, whose forward cannot be masked: pass the Python module."
            )
        if type(module).__name__ == "OptimizedModule":
            raise ModelError(
                f"{path or 'the model'} is the result of torch.compile: pass the module that was compiled."
            )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; training flags, buffers, random state and torch's attention fast path restored after."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [(m, n, b, b.clone()) for m in modules for n, b in m._buffers.items() if b is not None]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    cuda = sorted({t.device.index for t in [*model.parameters(), *model.buffers()] if t.is_cuda})
    with torch.random.fork_rng(devices=cuda):
        try:
            # The fast path runs attention and MLP as one op, past the modules. Flags are set without train(), which
            # some modules override to merge weights.
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.training = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, flag in zip(modules, training, strict=True):
                module.training = flag
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):
                    with torch.no_grad():
                        buffer.copy_(saved)


def _compact(rows: list[int]) -> Sequence[int]:
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    straight = range(rows[0], rows[0] + step * len(rows), step) if step else range(0)
    return straight if list(straight) == rows else tuple(rows)


class _Finder(Provenance):
    """Records the sites of a forward: hooks know the modules, torch functions know the tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model
        self.stack: list[nn.Module] = []  # modules whose forward is running
        self.paths = {module: path for path, module in model.named_modules()}
        self.owners: dict[int, list[tuple[str, str]]] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                self.owners.setdefault(id(parameter), []).append((path, name))
        self.found: dict[tuple[str, str], Site] = {}  # by path and parameter
        self.fed: dict[tuple[str, str], set[int]] = {}  # rows of a layer that go straight into a BatchNorm site

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for module in self.model.modules():
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.stack.append(module)
        # A subclass may normalise without calling F.batch_norm.
        weight = module._parameters.get("weight") if isinstance(module, _BatchNorm) else None
        if weight is not None and args:
            # As `_maker` does: norms that share their weight are one site.
            owners = self.owners[id(weight)]
            self._batch_norm(Maker("batch_norm", *owners[0], len(weight)), args[0], len(owners) > 1)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.stack.pop()
        # An activation written as autograd.Function or TorchScript is no torch function: its module speaks for it.
        if isinstance(output, Tensor) and not self.seen(output) and len(args) == 1:
            tag = self.tag(args[0])
            leaf = not list(module.children()) and not list(module.parameters())
            if tag is not None and leaf and output.shape == args[0].shape:
                self.put(output, replace(tag, pure=False, acted=True))

    def sites(self, output: Any) -> list[Site]:
        """What was found, less the convolutions that BatchNorm sites stand for and less the model's own logits."""
        logits = set()
        own = getattr(output, "logits", None)  # of an object that is no mapping
        for tensor in [own] if isinstance(own, Tensor) else tensors(output):
            tag = self.tag(tensor)
            for part in tag.parts if tag is not None and tensor.dim() == 2 else ():
                if rows_along(part.index, 1) == list(range(part.maker.rows)):
                    logits.add((part.maker.path, part.maker.parameter))
        fed = {key for key, rows in self.fed.items() if key in self.found and len(rows) == self.found[key].neurons}
        return [
            site
            for key, site in self.found.items()
            if not (site.kind == "conv" and key in fed) and not (site.kind in ("conv", "batch_norm") and key in logits)
        ]

    def _record(self, maker: Maker, neurons: int, sources: tuple[Source, ...], repeat: int, functional: bool) -> None:
        key = (maker.path, maker.parameter)
        site = Site(maker.path, maker.kind, neurons, 0, sources, repeat, maker.parameter, functional)
        old = self.found.setdefault(key, site)
        if old is not site and old.kind == site.kind:
            more = tuple(source for source in sources if source not in old.sources)
            self.found[key] = replace(old, sources=old.sources + more, functional=old.functional or functional)

    def _maker(self, kind: str, weight: Tensor, rows: int) -> tuple[Maker | None, bool]:
        """The layer that owns ``weight``, and whether it is used past its module or by more than one."""
        module = self.stack[-1] if self.stack else self.model
        owners = self.owners.get(id(weight))
        if owners is None:  # a weight computed from the parameter, as in weight standardization
            own = isinstance(module, _ConvNd | nn.Linear) and module._parameters.get("weight") is not None
            return (Maker(kind, self.paths[module], "weight", rows) if own else None), False
        path, name = owners[0]
        called = isinstance(module, _ConvNd | nn.Linear | _BatchNorm) and self.paths[module] == path
        return Maker(kind, path, name, rows), not called or len(owners) > 1

    # ------------------------------------------------------------ layers
    def layer(self, call: Call, outputs: list[Tensor]) -> Sequence[Tag | None] | None:
        if call.name in _LAYERS:
            return self._layer(call, outputs[0])
        if call.name == "multi_head_attention_forward":
            self._multi_head(call)
            return []
        if call.name == "scaled_dot_product_attention":
            return [self._heads(outputs[0], -3, call.argument(2, "value"), -3)]
        if call.name == "softmax":
            return [Tag(softmax=True)]
        if call.name in ("matmul", "rmatmul", "einsum"):
            return [self._weighted(call, outputs[0])]
        return None

    def _layer(self, call: Call, output: Tensor) -> Sequence[Tag | None] | None:
        kind = _LAYERS[call.name]
        weight = call.argument(3 if kind == "batch_norm" else 1, "weight")
        tag = self.tag(call.args[0]) if call.args else None
        if weight is None:
            return None
        if kind == "linear" and tag is not None and tag.softmax:
            return [tag]  # talking heads: mixed attention weights are attention weights
        dim = {"linear": -1, "batch_norm": 1, "conv": output.dim() - weight.dim() + 1}[kind]
        maker, functional = self._maker(kind, weight, output.shape[dim])
        if maker is None:
            return []
        if kind == "batch_norm":
            self._batch_norm(maker, call.args[0], functional)
        elif kind == "conv":
            transposed = isinstance(self.model.get_submodule(maker.path), _ConvTransposeNd)
            if transposed != ("transpose" in call.name):  # a bare parameter does not say which rows are its outputs
                return []
            self._record(maker, maker.rows, (Source(maker.path, maker.parameter, range(maker.rows)),), 1, functional)
        elif tag is not None and tag.acted:
            self._linear(maker, tag, weight.shape[1], functional)
        return [Tag((_part(maker, output, dim),), pure=True)]

    def _batch_norm(self, maker: Maker, x: Any, functional: bool) -> None:
        tag = self.tag(x)
        sources: tuple[Source, ...] = ()
        if self.constant(x):
            return
        if tag is not None and tag.pure and [p.maker.kind for p in tag.parts] in (["conv"], ["linear"]):
            part = tag.parts[0]
            rows = rows_along(part.index, 1)
            if rows is not None:
                sources = (Source(part.maker.path, part.maker.parameter, _compact(rows)),)
                self.fed.setdefault((part.maker.path, part.maker.parameter), set()).update(rows)
        self._record(maker, maker.rows, sources, 1, functional)

    def _linear(self, maker: Maker, tag: Tag, width: int, functional: bool) -> None:
        """A site in front of a linear layer, if its columns are hidden units or heads."""
        columns = [(part.maker, rows) for part in tag.parts if (rows := rows_along(part.index, -1)) is not None]
        kinds = {source.kind for source, _ in columns}
        if len(columns) < len(tag.parts):
            return
        if kinds == {"linear"} and all(len(set(rows)) == width for _, rows in columns):
            sources = tuple(Source(source.path, source.parameter, _compact(rows)) for source, rows in columns)
            self._record(replace(maker, kind="mlp"), width, sources, 1, functional)
        elif kinds == {"heads"}:
            heads = columns[0][0].rows
            if columns[0][1] == [head for head in range(heads) for _ in range(width // heads)]:
                self._record(replace(maker, kind="heads"), heads, tag.note, width // heads, functional)

    # ------------------------------------------------------------ attention
    def _heads(self, output: Tensor, dim: int, value: Any, value_dim: int) -> Tag | None:
        """Tag of an attention result whose dimension ``dim`` counts the heads; the note has the value rows."""
        if output.dim() < 4:
            return None
        heads = output.shape[dim]
        sources = _value_rows(self.tag(value), heads, value_dim)
        return Tag((_part(Maker("heads", "", "", heads), output, dim),), acted=True, note=sources)

    def _weighted(self, call: Call, output: Tensor) -> Tag | None:
        """Product of attention weights and values, written out."""
        operands = list(tensors(call.args))
        weights = [bool((tag := self.tag(x)) and tag.softmax) for x in operands]
        if len(operands) != 2 or sum(weights) != 1:
            return None
        value = operands[weights.index(False)]
        if call.name != "einsum":
            return self._heads(output, -3, value, -3)
        equation = call.args[0].replace(" ", "") if isinstance(call.args[0], str) else ""
        terms, _, result = equation.partition("->")
        letters = terms.split(",")[weights.index(True)][-3:-2]  # of (..., head, query, key)
        values = terms.split(",")[weights.index(False)]
        if "." in equation or not letters or letters not in result or letters not in values:
            return None
        return self._heads(output, result.index(letters), value, values.index(letters))

    def _multi_head(self, call: Call) -> None:
        """torch.nn.functional.multi_head_attention_forward: heads in front of its out_proj_weight."""
        heads, in_proj = call.argument(4, "num_heads"), call.argument(5, "in_proj_weight")
        out_proj = call.argument(11, "out_proj_weight")
        width = out_proj.shape[1]
        maker, _ = self._maker("heads", out_proj, heads)
        value = call.kwargs.get("v_proj_weight") if call.kwargs.get("use_separate_proj_weight") else in_proj
        if maker is None or value is None:
            return
        source, _ = self._maker("linear", value, len(value))
        rows = range(len(value) - width, len(value))  # of q, k, v
        sources = (Source(source.path, source.parameter, rows),) if source is not None else ()
        self._record(maker, heads, sources, width // heads, True)


def _part(maker: Maker, output: Tensor, dim: int) -> Part:
    shape = [1] * output.dim()
    shape[dim] = maker.rows
    return Part(maker, torch.arange(maker.rows, dtype=torch.int32).view(shape).expand(output.shape))


def _value_rows(tag: Tag | None, heads: int, dim: int) -> tuple[Source, ...]:
    """The rows that make the value of each head, those of head 0 first; none if not known."""
    if tag is None or len(tag.parts) != 1 or tag.parts[0].index.dim() < 3:
        return ()
    part = tag.parts[0]
    rows: list[list[int]] = [index.unique().tolist() for index in part.index.movedim(dim, 0).flatten(1)]
    if heads % len(rows) or len({len(row) for row in rows}) != 1:
        return ()
    shared = heads // len(rows)  # queries in groups share the value of one head
    flat = [r for row in rows for _ in range(shared) for r in row]
    return (Source(part.maker.path, part.maker.parameter, _compact(flat)),)
