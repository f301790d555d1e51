"""Which row of which layer every entry of a tensor comes from, followed through a forward.

A tensor that a layer makes carries an integer tensor of its own shape with the output row of each entry. Elementwise
functions keep it and shape functions are applied to it too, so that channels, hidden units and heads stay known behind
any view, window or shift, and no architecture has to be known by name.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Names of torch functions without underscores at the ends: "relu" stands for F.relu, Tensor.relu_ and torch.relu.
ACTIVATIONS = _names(
    "abs celu clamp clamp_min clip elu erf exp gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu "
    "logsigmoid mish pow prelu relu relu6 rrelu selu sigmoid silu sin softplus softshrink softsign square tanh "
    "tanhshrink threshold"
)
TRANSPARENT = _names(
    "alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout group_norm "
    "layer_norm neg rms_norm"
)
CASTS = _names("bfloat16 clone contiguous cpu cuda detach double float half requires_grad to type type_as")
PRODUCTS = _names("div divide idiv imul itruediv mul multiply rdiv rmul rtruediv truediv")
SUMS = _names("add iadd isub radd rsub sub subtract")
RESHAPES = _names("flatten reshape reshape_as unflatten view view_as")
VIEWS = _names(
    "adjoint channel_shuffle chunk expand expand_as flip get getitem index_select moveaxis movedim narrow permute "
    "pixel_shuffle pixel_unshuffle roll select split split_with_sizes squeeze swapaxes swapdims t tensor_split "
    "transpose unbind unsqueeze"
)
REDUCTIONS = _names("amax max mean sum")


@dataclass(frozen=True)
class Maker:
    """A layer that tensors come from. ``rows``: how many neurons it makes."""

    kind: str  # "conv" | "linear" | "batch_norm" | "heads"
    path: str
    parameter: str
    rows: int


@dataclass(frozen=True)
class Part:
    """``index``: int32, shape of the tensor, the row of ``maker`` that each entry comes from."""

    maker: Maker
    index: Tensor


@dataclass(frozen=True)
class Tag:
    """What is known of a tensor. Several parts: a gated unit, made of one row of each."""

    parts: tuple[Part, ...] = ()
    pure: bool = False  # nothing but views since the layer
    acted: bool = False  # an activation was applied
    softmax: bool = False  # attention weights
    constant: bool = False  # made of weights alone, as position biases and standardized weights are
    note: Any = None  # whatever the maker wants to find again


@dataclass(frozen=True)
class Call:
    """One call of a torch function; ``before``: the tags of its tensors, read before it could write into them."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size | None  # of the first argument
    before: list[Tag | None]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def rows_along(index: Tensor, dim: int) -> list[int] | None:
    """The row at each position of ``dim``; None if it varies along another dimension."""
    flat = index.movedim(dim, -1).reshape(-1, index.shape[dim])
    if len(flat) == 0 or not bool((flat == flat[0]).all()):
        return None
    rows: list[int] = flat[0].tolist()
    return rows


class Provenance(TorchFunctionMode, ABC):
    """Follows tags through every torch function called inside; a subclass says in ``layer`` what makes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {id(t) for t in [*model.parameters(), *model.buffers()]}
        self._tags: dict[int, tuple[weakref.ref[Tensor], Tag | None]] = {}

    @abstractmethod
    def layer(self, call: Call, outputs: list[Tensor]) -> Sequence[Tag | None] | None:
        """Tags of the outputs of a function that makes neurons; None for any other function."""

    def seen(self, tensor: Tensor) -> bool:
        known = self._tags.get(id(tensor))
        return known is not None and known[0]() is tensor

    def tag(self, value: Any) -> Tag | None:
        return self._tags[id(value)][1] if isinstance(value, Tensor) and self.seen(value) else None

    def put(self, tensor: Tensor, tag: Tag | None) -> None:
        self._tags[id(tensor)] = (weakref.ref(tensor), tag)

    def constant(self, tensor: Any) -> bool:
        """Whether a tensor is made of parameters and buffers alone, so that it is the same for every picture."""
        tag = self.tag(tensor)
        return id(tensor) in self._weights or (tag is not None and tag.constant)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [*tensors(args), *tensors(kwargs)]
        shape = args[0].shape if args and isinstance(args[0], Tensor) else None
        name = getattr(func, "__name__", "").strip("_")
        call = Call(name, func, args, kwargs, shape, [self.tag(tensor) for tensor in inputs])
        constant = all(self.constant(tensor) for tensor in inputs)
        output = func(*args, **kwargs)
        outputs = [args[0]] if name == "setitem" else list(tensors(output))
        tags: Sequence[Tag | None] = []
        if constant:
            tags = [Tag(constant=True)] * len(outputs)
        elif outputs:
            made = self.layer(call, outputs)
            tags = self._carry(call, outputs) if made is None else made
        for i, tensor in enumerate(outputs):
            self.put(tensor, tags[i] if i < len(tags) else None)
        return output

    def _carry(self, call: Call, outputs: list[Tensor]) -> Sequence[Tag | None]:
        name, output = call.name, outputs[0]
        if name in PRODUCTS or name in SUMS:
            return [self._binary(call, output)]
        tag = call.before[0] if call.before else None
        if tag is None or call.shape is None:
            return []
        if name in CASTS and output.shape == call.shape:
            return [tag]
        if (name in ACTIVATIONS or name in TRANSPARENT or name == "batch_norm") and output.shape == call.shape:
            return [replace(tag, pure=False, acted=tag.acted or name in ACTIVATIONS)]
        if name == "glu":
            halves = [Part(p.maker, half) for p in tag.parts for half in p.index.chunk(2, call.argument(1, "dim", -1))]
            return [replace(tag, parts=tuple(halves), pure=False, acted=True)]
        if name in RESHAPES or name in VIEWS:
            return _view(call, tag, outputs)
        if name in REDUCTIONS or "pool" in name:
            return [_reduce(call, tag, output)]
        return []

    def _binary(self, call: Call, output: Tensor) -> Tag | None:
        """Sum or product: with scalars and vectors, of one row with itself (as gelu written out), or of two gates."""
        operands = [x for x in [*call.args, *call.kwargs.values()] if isinstance(x, Tensor)]
        known = [(x, tag) for x in operands if x.shape == output.shape and (tag := self.tag(x)) and not tag.constant]
        if not known:
            return None
        first = known[0][1]
        if len(known) == 1:
            # A sum with a whole tensor is a residual stream, in which a row is no longer one neuron.
            small = all(x is known[0][0] or x.dim() <= 1 for x in operands)
            return replace(first, pure=False) if small or first.softmax or call.name in PRODUCTS else None
        second = known[1][1]
        extra = tuple(p for p in second.parts if not any(_same(p, q) for q in first.parts))
        if extra and call.name in SUMS:
            return None
        heads = [t for t in (first, second) if any(p.maker.kind == "heads" for p in t.parts)]
        if len(heads) == 1:  # a gate on attention: the head is the neuron
            return replace(heads[0], pure=False)
        return replace(first, parts=first.parts + extra, pure=False, acted=first.acted or second.acted)


def _same(a: Part, b: Part) -> bool:
    return a.maker == b.maker and (a.index is b.index or torch.equal(a.index, b.index))


def _view(call: Call, tag: Tag, outputs: list[Tensor]) -> Sequence[Tag | None]:
    moved: list[list[Part]] = [[] for _ in outputs]
    for part in tag.parts:
        try:
            if call.name in RESHAPES:  # view() would refuse the expanded strides of an index
                indices = [part.index.reshape(outputs[0].shape)]
            else:
                indices = list(tensors(call.func(part.index, *call.args[1:], **call.kwargs)))
        except (RuntimeError, TypeError, IndexError):
            return []
        if [index.shape for index in indices] != [output.shape for output in outputs]:
            return []
        for parts, index in zip(moved, indices, strict=True):
            parts.append(Part(part.maker, index))
    return [replace(tag, parts=tuple(parts)) for parts in moved]


def _reduce(call: Call, tag: Tag, output: Tensor) -> Tag | None:
    """Pooling and means, over dimensions along which the row does not change."""
    parts = []
    for part in tag.parts:
        index = part.index
        if "pool" in call.name:
            first = index[(slice(None), slice(None), *[slice(1)] * (index.dim() - 2))]
            if output.dim() != index.dim() or output.shape[:2] != index.shape[:2]:
                return None
            low, high = first.expand_as(index), index
            reduced = first.expand(output.shape)
        else:
            dim, keep = call.argument(1, "dim"), call.argument(2, "keepdim", False)
            if dim is None or not isinstance(keep, bool):
                return None
            low, high = index.amin(dim, keep), index.amax(dim, keep)
            reduced = high
        if reduced.shape != output.shape or not torch.equal(low, high):
            return None
        parts.append(Part(part.maker, reduced))
    return replace(tag, parts=tuple(parts), pure=False)
