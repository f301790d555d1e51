"""Convolutions, linear layers and attention whose weights are frozen: only gradients of the input, weights packed once.

On a CPU the products are oneDNN's, with weights in its own order for forward and for backward. Measured on two cores of
a Zen 5, ResNet-50, batch 8: all convolutions forward and backward take 163 ms in bfloat16 against 182 ms of torch's own
calls, and float32 linear layers 18 ms against 40 ms of the BLAS that torch calls there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnp_fast.ops import winograd
from mnp_fast.ops.differentiable import differentiable_once

_FEW_POSITIONS = 196
"""Up to so many, 1x1 convolutions run as linear layers. bfloat16 on a Xeon with AMX: (4, 512, 7, 7) to 2048 channels
.47 against .69 ms, 256 to 1024 at 14x14 .82 against 1.09, at 56x56 as fast or slower; float32 2.6 against 2.9."""
_FEW_CHANNELS = 4
"""Up to so many in, the gradient of the input of a strided convolution is made by phases (`_Phases`)."""
_ATTENTION_LENGTH = 1024
"""Longest sequence whose attention matrix is kept: 2 MB a head and picture in bfloat16."""


def packs(weight: Tensor) -> bool:
    """Whether products with this weight run on oneDNN with a packed weight."""
    mkldnn = torch.backends.mkldnn
    return weight.device.type == "cpu" and bool(mkldnn.is_available() and mkldnn.enabled)


class FrozenConv2d(nn.Module):
    """``F.conv2d`` with a weight that never changes. Inputs are cast to the dtype of the weight.

    weight: (out, in / groups, kh, kw) float32 or bfloat16; bias: (out,) or None. x: (N, in, H, W); the result is
    channels_last.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.plain = weight.detach().contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.detach().to(weight.dtype)
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups
        self.kernel = list(weight.shape[2:])
        self.packs = packs(weight)
        self._packed: Tensor | None = None
        self._packed_back: Tensor | None = None
        plain = self.stride == [1, 1] and self.dilation == [1, 1] and groups == 1 and bias is None
        linear = plain and self.kernel == [1, 1] and self.padding == [0, 0] and self.packs
        self._linear = FrozenLinear(weight.flatten(1), None) if linear else None
        self._winograd = winograd.kernel(weight) if plain else None
        self._transformed: Tensor | None = None
        self._transformed_back: Tensor | None = None
        strided = max(self.stride) > 1 and self.dilation == [1, 1] and groups == 1
        few = strided and weight.shape[1] <= _FEW_CHANNELS and self.packs
        self._phases = _Phases(self.plain, self.stride, self.padding) if few else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        y: Tensor = _Convolution.apply(x, self)
        return y

    def run(self, x: Tensor) -> Tensor:
        if not self.packs:
            return F.conv2d(x, self.plain, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self._winograd is not None and winograd.pays(x.shape, self.padding):
            if self._transformed is None:
                self._transformed = winograd.transformed(self.plain)
            return self._winograd(x, self._transformed, len(self.plain), self.padding)
        if self._linear is not None and x.shape[2] * x.shape[3] <= _FEW_POSITIONS:
            return _on_rows(self._linear.run, x)
        if self._packed is None:
            self._packed = _pack(self.plain, self.padding, self.stride, self.dilation, self.groups, x.shape)
        return _pointwise(x, self._packed, self.bias, self.padding, self.stride, self.dilation, self.groups)

    def back(self, grad: Tensor, shape: torch.Size, onto: Tensor | None = None) -> Tensor:
        """Gradient of an input of that shape; with ``onto``, that tensor, which the gradient has been added to."""
        grad = grad.to(self.dtype).contiguous(memory_format=torch.channels_last)
        whole = self.stride == [1, 1] and self.dilation == [1, 1]
        whole = whole and all(p < k for p, k in zip(self.padding, self.kernel, strict=True))
        subsampled = self.kernel == [1, 1] and self.padding == [0, 0]
        if self.packs and (whole or subsampled):
            # A convolution of the gradient with the flipped filters, inputs and outputs exchanged.
            padding = [k - 1 - p for k, p in zip(self.kernel, self.padding, strict=True)]
            if whole:
                return self._turned_around(grad, padding, onto)
            dense = self._turned_around(grad, padding, None)
            if onto is None:
                onto = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last).zero_()
                onto[:, :, :: self.stride[0], :: self.stride[1]] = dense
            else:
                onto[:, :, :: self.stride[0], :: self.stride[1]] += dense
            return onto
        if self.packs and self._phases is not None and self._phases.fit(grad.shape, shape):
            by_phases = self._phases.back(grad, shape)
            return by_phases if onto is None else onto.add_(by_phases)
        # Asks for the input's shape, never for its numbers.
        x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        result: Tensor = torch.ops.aten.convolution_backward(
            grad, x, self.plain, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups,
            [True, False, False],
        )[0]  # fmt: skip
        return result if onto is None else onto.add_(result)

    def _turned_around(self, grad: Tensor, padding: list[int], onto: Tensor | None) -> Tensor:
        if self._winograd is not None and winograd.pays(grad.shape, padding):
            if self._transformed_back is None:
                self._transformed_back = winograd.transformed(_turned(self.plain, 1))
            result = self._winograd(grad, self._transformed_back, self.plain.shape[1], padding)
            return result if onto is None else onto.add_(result)
        if self._packed_back is None:
            self._packed_back = _pack(
                _turned(self.plain, self.groups), padding, [1, 1], [1, 1], self.groups, grad.shape
            )
        if onto is None:
            return _pointwise(grad, self._packed_back, None, padding, [1, 1], [1, 1], self.groups)
        torch.ops.mkldnn._convolution_pointwise_.binary(
            onto, grad, self._packed_back, None, padding, [1, 1], [1, 1], self.groups, "add", 1.0, None, [], None
        )
        return onto


class _Phases:
    """The gradient of the input of a strided convolution: positions that are equal modulo the stride, a phase, meet the
    same part of each filter, so that all phases are the channels of one convolution with stride 1 and are then put side
    by side.

    With few channels in, torch's own takes three to seven times as long (bfloat16, 8 pictures, one thread of an AMD
    EPYC: 47 ms to 18 for ResNet's first layer, 54 to 9 for the patches of ViT-B/16); with 128 and 3x3 filters half.
    """

    def __init__(self, weight: Tensor, stride: list[int], padding: list[int]) -> None:
        out, channels = weight.shape[:2]
        self.stride = stride
        parts = [_phases_along(*sizes) for sizes in zip(weight.shape[2:], stride, padding, strict=True)]
        self.low = [min(i - len(taps) + 1 for i, taps in part if taps) for part in parts]
        self.high = [max(i for i, taps in part if taps) for part in parts]
        self.padding = [max(-low, high) for low, high in zip(self.low, self.high, strict=True)]
        lengths = [high - low + 1 for low, high in zip(self.low, self.high, strict=True)]
        filters = weight.new_zeros(*stride, channels, out, *lengths)
        for a, (i, taps) in enumerate(parts[0]):
            for b, (j, others) in enumerate(parts[1]):
                for m, y in enumerate(taps):
                    for n, x in enumerate(others):
                        filters[a, b, :, :, i - m - self.low[0], j - n - self.low[1]] = weight[:, :, y, x].t()
        self.filters = filters.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        self._packed: Tensor | None = None

    def fit(self, grad: torch.Size, shape: torch.Size) -> bool:
        """Whether the input's sides are multiples of the stride, and are all reached."""
        sides = zip(shape[2:], grad[2:], self.stride, self.padding, self.high, strict=True)
        return all(x % s == 0 and x // s <= y + padding - high for x, y, s, padding, high in sides)

    def back(self, grad: Tensor, shape: torch.Size) -> Tensor:
        if self._packed is None:
            self._packed = _pack(self.filters, self.padding, [1, 1], [1, 1], 1, grad.shape)
        found = _pointwise(grad, self._packed, None, self.padding, [1, 1], [1, 1], 1)
        (height, width), (down, across) = shape[2:], self.stride
        for dim, side, s in ((2, height, down), (3, width, across)):
            found = found.narrow(dim, self.low[dim - 2] + self.padding[dim - 2], side // s)
        phases = found.permute(0, 2, 3, 1).unflatten(3, (down, across, shape[1])).permute(0, 1, 3, 2, 4, 5)
        return phases.reshape(shape[0], height, width, shape[1]).permute(0, 3, 1, 2)


def _phases_along(kernel: int, stride: int, padding: int) -> list[tuple[int, range]]:
    """For each phase a of one side: the first position of the result, counted from q, that position stride * q + a of
    the input reaches, and the filter's taps that reach it and, one back each, those before it."""
    return [((a + padding) // stride, range((a + padding) % stride, kernel, stride)) for a in range(stride)]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.run(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (ctx.layer.back(grad, ctx.shape) if ctx.needs_input_grad[0] else None), None


def _on_rows(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A product of every position's channels; x: (N, C, H, W) channels_last, as the result is."""
    rows = x.permute(0, 2, 3, 1)
    return product(rows.reshape(-1, x.shape[1])).view(*rows.shape[:3], -1).permute(0, 3, 1, 2)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """Filters for the gradient of the input: (in, out / groups, kh, kw), flipped."""
    out, per_group, kh, kw = weight.shape
    parts = weight.flip(2, 3).view(groups, out // groups, per_group, kh, kw).transpose(1, 2)
    return parts.reshape(groups * per_group, out // groups, kh, kw).contiguous(memory_format=torch.channels_last)


def _pack(
    weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, shape: torch.Size
) -> Tensor:
    packed: Tensor = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        weight.to_mkldnn(), padding, stride, dilation, groups, shape
    )
    return packed


def _pointwise(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, padding, stride, dilation, groups, "none", [], ""
    )
    return y


class FrozenLinear(nn.Module):
    """``F.linear`` with a weight that never changes, always as one two-dimensional product.

    weight: (out, in) float32 or bfloat16; bias: (out,) or None. x: (..., in), cast to the dtype of the weight. A
    transposed x is taken in the order of its memory: torch's own backward runs such an input as a batch of small
    products, which took 7.5 of 8.1 s of a step of torchvision's ViT-B/16 in bfloat16 on two cores.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.plain = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach().to(weight.dtype)
        self.packs = packs(weight)
        self._packed: Tensor | None = None
        self._packed_back: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        order = [*sorted(range(x.dim() - 1), key=x.stride, reverse=True), x.dim() - 1]
        moved = x.permute(order)
        y: Tensor = _Linear.apply(moved.reshape(-1, x.shape[-1]).to(self.dtype), self)
        back = [order.index(i) for i in range(x.dim())]
        return y.view(*moved.shape[:-1], y.shape[-1]).permute(back)

    def run(self, x: Tensor) -> Tensor:
        if not self.packs:
            return F.linear(x, self.plain, self.bias)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.plain, x.shape[0])
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def back(self, grad: Tensor) -> Tensor:
        grad = grad.to(self.dtype).contiguous()
        if not self.packs:
            return torch.mm(grad, self.plain)
        if self._packed_back is None:
            self._packed_back = torch.ops.mkldnn._reorder_linear_weight(self.plain.t().contiguous(), grad.shape[0])
        y: Tensor = torch.ops.mkldnn._linear_pointwise(grad, self._packed_back, None, "none", [], "")
        return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.run(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (ctx.layer.back(grad) if ctx.needs_input_grad[0] else None), None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, scale 1/sqrt(d) by default. q, k, v: (B, H, T, d); returns the same shape.

    In bfloat16 on a CPU as batched products that keep the attention matrix: (8, 12, 197, 64) takes 4 + 7 ms forward and
    backward on two cores against 9 + 23 ms of torch's fused kernel. Anywhere else, and for long sequences, torch's own.
    """
    plain = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype == torch.bfloat16
    if not plain or q.device.type != "cpu" or q.shape[-2] > _ATTENTION_LENGTH:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    y: Tensor = _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shape = q.shape
        q, k, v = (t.reshape(-1, *shape[-2:]) for t in (q * scale, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v).view(shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(q.shape)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return grad_q.view(shape), grad_k.view(shape), grad_v.view(shape), None
