"""A program run node by node: what follows a neuron is run for many removals at once, what precedes it only once.

At a site the clean values are repeated along the pictures, once a removal; in every repetition one neuron is replaced
by what its removal leaves, and the rest of the network runs once for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mnp_fast.errors import DataError
from mnp_fast.graph.program import Program, products_in
from mnp_fast.sites import Site

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Rows:
    """Where the pictures are in a tensor: ``inner`` entries each along ``dim``, those of a picture together or not."""

    dim: int
    inner: int
    together: bool

    @property
    def pictures(self) -> int:
        """The dimension that counts the pictures alone in what `apart` gives."""
        return self.dim + (self.inner > 1 and not self.together)

    def apart(self, x: Tensor) -> Tensor:
        """A view that has a dimension for the pictures alone."""
        if self.inner == 1:
            return x
        return x.unflatten(self.dim, (-1, self.inner) if self.together else (self.inner, -1))

    def repeat(self, x: Tensor, times: int) -> Tensor:
        """A copy with all pictures ``times`` times in a row."""
        repeated = torch.cat([self.apart(x)] * times, self.pictures)
        return repeated if self.inner == 1 else repeated.flatten(self.dim, self.dim + 1)


class Walk:
    """The nodes of a program: which use the mask of each site, and where the pictures are in their values.

    program: one in which no picture depends on another. image: one picture, (1, ...). The program runs once, on this
    picture and one of NaN: what of a value is NaN then belongs to the second picture.
    """

    def __init__(self, program: Program, sites: Sequence[Site], image: Tensor) -> None:
        self.program, self.sites = program, sites
        self.nodes: list[fx.Node] = list(program.module.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.uses: list[list[fx.Node]] = [[] for _ in sites]
        self.rows: dict[fx.Node, Any] = {}  # of values that come from the pictures; None: not known
        self.sizes: dict[fx.Node, tuple[int, bool] | None] = {}  # of the pictures: (size, whether a picture's)
        self.resized: set[fx.Node] = set()  # values that depend on such sizes, and not on the pictures themselves
        self.heavy: list[float] = []  # bytes a picture that this node and those behind it need at most
        self.last = {node: max((self.index[user] for user in node.users), default=0) for node in self.nodes}
        self.ones = torch.ones(sum(program.sizes), device=image.device)
        with torch.no_grad():
            self._probe(image)
        self.bound = self._bound()

    # ------------------------------------------------------------ public
    def order(self, site: int) -> bool | None:
        """Whether the rows of one picture are together where the site is masked; None where that is not known."""
        found = {self.rows.get(node) for node in self.uses[site]}
        rows = found.pop() if len(found) == 1 else None
        return rows.together if isinstance(rows, Rows) and rows.dim == 0 else None

    @torch.no_grad()
    def losses(
        self, images: Tensor, labels: Tensor, neurons: Mapping[int, Sequence[int]], budget: float
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Cross-entropy summed over these pictures: (), and for every site in ``neurons`` without each of its neurons.

        neurons: site to numbers of neurons within it. budget: bytes that repeated values may take. float64.
        """
        first = {self.uses[site][0]: site for site in neurons if self.uses[site]}
        found: dict[int, Tensor] = {}
        values: Values = {}
        self._masks(self.ones)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with products_in(self.program.dtype, self.program.device):
            for node in self.nodes:
                if node in first:
                    site = first[node]
                    found[site] = self._without(node, site, neurons[site], values, labels, budget)
                self._step(node, values, images)
        (loss,) = _losses(self._logits(values), labels, 1)
        return loss, {site: found.get(site, loss.expand(len(chosen))) for site, chosen in neurons.items()}

    # ------------------------------------------------------------ running
    def _masks(self, mask: Any) -> None:
        """What every node of this thread is masked with from now on."""
        self.program.views.of = mask.split(self.program.sizes) if isinstance(mask, Tensor) else mask

    def _call(self, node: fx.Node, values: Values) -> Any:
        module = self.program.module
        if node.op == "get_attr":
            return getattr(module, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        function: Callable[..., Any] = getattr(module, node.target) if isinstance(node.target, str) else node.target
        return function(*args, **kwargs)

    def _step(self, node: fx.Node, values: Values, images: Tensor | None = None) -> None:
        """Run a node, and forget what no later one needs."""
        if node.op != "output":
            values[node] = images if node.op == "placeholder" else self._call(node, values)
            self._forget(node, values)

    def _forget(self, node: fx.Node, values: Values) -> None:
        for past in [node, *node.all_input_nodes]:
            if self.last[past] <= self.index[node]:
                del values[past]

    def _logits(self, values: Values) -> Tensor:
        (node,) = self.nodes[-1].all_input_nodes
        logits: Tensor = values[node]
        return logits

    # ------------------------------------------------------------ the first run
    def _probe(self, image: Tensor) -> None:
        pictures = torch.cat([image, torch.full_like(image, torch.nan)])
        spy = _Spy(self.ones.split(self.program.sizes))
        self._masks(spy)
        values: Values = {}
        data: set[fx.Node] = set()
        with products_in(self.program.dtype, self.program.device):
            for node in self.nodes[:-1]:
                value = values[node] = pictures if node.op == "placeholder" else self._call(node, values)
                for site in spy.taken():
                    self.uses[site].append(node)
                if node.op == "placeholder" or any(argument in data for argument in node.all_input_nodes):
                    if any(isinstance(part, Tensor) for part in _flat(value)):
                        data.add(node)
                        self.rows[node] = _rows(value)
                    else:
                        self.sizes[node] = self._size(node, value, values)
                        self.resized.add(node)
                elif any(argument in self.resized for argument in node.all_input_nodes):
                    self.resized.add(node)
                parts = [part for live in data & values.keys() for part in _flat(values[live])]
                self.heavy.append(sum(part.nbytes for part in parts if isinstance(part, Tensor)) / 2)
                self._forget(node, values)
        self.heavy.append(0.0)
        for i in range(len(self.heavy) - 2, -1, -1):
            self.heavy[i] = max(self.heavy[i], self.heavy[i + 1])

    def _size(self, node: fx.Node, value: Any, values: Values) -> tuple[int, bool] | None:
        if node.target is not torch.ops.aten.sym_size.int:
            return None
        x, dim = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(dim, int)
        rows = self.rows[x]
        if not isinstance(rows, Rows):
            return None
        counts = rows.dim == dim % values[x].dim()
        return (value // 2 if counts else value), counts

    def _bound(self) -> set[int]:
        """Nodes behind which nothing can be copied, because a value is changed later that has another name too."""
        bound: set[int] = set()
        for node in self.nodes:
            if not _changes(node):
                continue
            root, shared = node.all_input_nodes[0], False
            while True:
                shared = shared or len(root.users) > 1
                if not _is_view(root):
                    break
                root = root.all_input_nodes[0]
            if root in self.resized:
                return set(range(len(self.nodes)))
            if shared:
                bound.update(range(self.index[root], self.index[node]))
        return bound

    # ------------------------------------------------------------ removals
    def _without(
        self, node: fx.Node, site: int, neurons: Sequence[int], values: Values, labels: Tensor, budget: float
    ) -> Tensor:
        """Losses (len(neurons),) without each neuron of the site, with the values in front of its first node."""
        live = {past: value for past, value in values.items() if self.last[past] > self.index[node]}
        if not self._repeats(node, site, live):
            return torch.cat([self._alone(node, site, neuron, values, labels) for neuron in neurons])
        clean, gone = self._both(node, values)
        at_once = max(1, int(budget / max(1.0, self.heavy[self.index[node]] * len(labels))))
        losses = []
        for start in range(0, len(neurons), at_once):
            part = neurons[start : start + at_once]
            own = self._repeated(live, len(part), len(part) * len(labels))
            own[node] = self.rows[node].repeat(clean, len(part))
            self._take_out(own[node], gone, node, site, part)
            for following in self.nodes[self.index[node] + 1 :]:
                if following in self.uses[site]:
                    own[following], rest = self._both(following, own)
                    self._take_out(own[following], rest, following, site, part)
                    self._forget(following, own)
                else:
                    self._step(following, own)
            losses.append(_losses(self._logits(own), labels, len(part)))
        return torch.cat(losses)

    def _repeats(self, node: fx.Node, site: int, live: Values) -> bool:
        """Whether the place of every picture is known in all that is repeated, and in the neurons of the site."""
        known = [rows for past in live if past in self.rows for rows in _flat(self.rows[past])]
        known += [self.rows.get(use) for use in self.uses[site]]
        return (
            all(isinstance(rows, Rows) for rows in known)
            and None not in self.sizes.values()
            and self.index[node] not in self.bound
        )

    def _both(self, node: fx.Node, values: Values) -> tuple[Tensor, Tensor]:
        """What the node gives with all neurons and with none."""
        clean = self._call(node, values)
        self._masks(torch.zeros_like(self.ones))
        gone = self._call(node, values)
        self._masks(self.ones)
        return clean, gone

    def _take_out(self, y: Tensor, gone: Tensor, node: fx.Node, site: int, neurons: Sequence[int]) -> None:
        """In the k-th repetition of ``y`` put ``gone`` for the k-th neuron; ``gone`` is repeated too, or not."""
        rows, repeat = self.rows[node], self.sites[site].repeat
        channels = 1 - y.dim() if self.sites[site].kind in ("batch_norm", "conv") else -1
        y, gone = rows.apart(y), rows.apart(gone)
        count = y.shape[rows.pictures] // len(neurons)
        repeated = gone.shape[rows.pictures] > count
        for k, neuron in enumerate(neurons):
            left = gone.narrow(rows.pictures, k * count if repeated else 0, count)
            left = left.narrow(channels, neuron * repeat, repeat)
            y.narrow(rows.pictures, k * count, count).narrow(channels, neuron * repeat, repeat).copy_(left)

    def _repeated(self, live: Values, times: int, pictures: int) -> Values:
        """The values with all pictures ``times`` times in a row, ``pictures`` in all."""
        known: Values = {}

        def resized(node: fx.Node) -> Any:
            size = self.sizes.get(node)
            if size is not None:
                return size[0] * pictures if size[1] else size[0]
            if node not in self.resized and node in live:
                return live[node]
            if node not in known:
                known[node] = self._call(node, {argument: resized(argument) for argument in node.all_input_nodes})
            return known[node]

        return {
            node: _repeat(value, self.rows[node], times) if node in self.rows else resized(node)
            for node, value in live.items()
        }

    def _alone(self, node: fx.Node, site: int, neuron: int, values: Values, labels: Tensor) -> Tensor:
        """Loss (1,) without one neuron, from the node on."""
        # One copy of all, in which values that share memory go on sharing it.
        own = dict(values)
        copied = [past for past in values if past.op != "get_attr"]
        own |= zip(copied, copy.deepcopy([values[past] for past in copied]), strict=True)
        mask = self.ones.clone()
        mask[self.sites[site].offset + neuron] = 0.0
        self._masks(mask)
        for following in self.nodes[self.index[node] :]:
            self._step(following, own)
        self._masks(self.ones)
        return _losses(self._logits(own), labels, 1)


class _Spy:
    """Views of the mask, of which it is noted which were taken."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self.views, self.seen = views, set[int]()

    def __getitem__(self, site: int) -> Tensor:
        self.seen.add(site)
        return self.views[site]

    def taken(self) -> set[int]:
        """Since this was last asked."""
        seen, self.seen = self.seen, set()
        return seen


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each picture, (pictures,) float64; DataError where a label is none of the classes."""
    if int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"the labels go up to {int(labels.max())}, but the model has {logits.shape[1]} classes: number the labels "
            "as in training."
        )
    return F.cross_entropy(logits.double(), labels, reduction="none")


def _losses(logits: Tensor, labels: Tensor, times: int) -> Tensor:
    """Cross-entropy summed over the pictures, (times,); logits: (times * pictures, classes). float64."""
    return losses_of(logits, labels.repeat(times)).view(times, -1).sum(1)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _rows(value: Any) -> Any:
    """Where the second of two pictures is, which is NaN; the same structure as the value."""
    if isinstance(value, list | tuple):
        return tuple(_rows(part) for part in value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    wrong = value.isnan()
    for dim in range(value.dim()):
        inner, odd = divmod(value.shape[dim], 2)
        if odd:
            continue
        along = wrong.movedim(dim, 0).flatten(1).any(1).tolist()
        if along == [False] * inner + [True] * inner:
            return Rows(dim, inner, True)
        if along == [False, True] * inner:
            return Rows(dim, inner, False)
    return None


def _repeat(value: Any, rows: Any, times: int) -> Any:
    if isinstance(value, list | tuple):
        return [_repeat(part, own, times) for part, own in zip(value, rows, strict=True)]
    return rows.repeat(value, times)


def _schema(node: fx.Node) -> torch.FunctionSchema | None:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _changes(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    """Whether its value shares memory with its first argument."""
    schema = _schema(node)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)
