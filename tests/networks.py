"""Networks that the tests of sites, masks and statistics run on, and what a model looks like before and after."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


# ---------------------------------------------------------------- small classifiers
class EluVGG(nn.Module):
    """Six conv-BN-ELU in three stages, in-place activations and dropout."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (32, 64, 128):
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU(inplace=True)]
                before = width
            layers += [nn.MaxPool2d(2), nn.Dropout(0.3)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Block(nn.Module):
    """Residual block; the shortcut is padded with zero channels or projected."""

    def __init__(self, before: int, width: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.padding = (width - before) // 2 if padded else 0
        self.stride = stride
        self.short = nn.Identity()
        if not padded and (stride > 1 or before != width):
            self.short = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + self.short(x))


class SmallResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], blocks: int, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers, before = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(before, width, 2 if stage and not block else 1, padded))
                before = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20() -> nn.Module:
    return SmallResNet((16, 32, 64), 3, padded=True)


def narrow_resnet18() -> nn.Module:
    return SmallResNet((16, 32, 64, 128), 2, padded=False)


# ---------------------------------------------------------------- a stranger's own modules
class CubeFunction(torch.autograd.Function):
    """An activation that no torch function stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return CubeFunction.apply(x)


class BareNorm(nn.BatchNorm2d):
    """A BatchNorm that computes its own formula, with an activation behind it."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            mean, var = input.mean((0, 2, 3)), input.var((0, 2, 3), unbiased=False)
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        return F.relu((input - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None])


class Stranger(nn.Module):
    """Functional activations, a module used twice, and every kind of site.

    Input (N, 3, 8, 8). ``found`` is what find_sites must give, in execution order.
    """

    found = (
        ("entry", "conv", 6),  # no norm
        ("twice", "conv", 6),
        ("bare", "batch_norm", 6),  # fed by `deep`
        ("up", "conv", 8),  # transposed, in two groups
        ("plain", "conv", 8),  # the BatchNorm behind it is not affine
        ("raw", "conv", 4),  # a parameter without a module
        ("bn", "batch_norm", 12),  # one-dimensional, fed by `first`
        ("down", "mlp", 10),  # gate and up in one linear layer
        ("mixed", "heads", 3),
        ("encoder.self_attn.out_proj", "heads", 4),
        ("encoder.linear2", "mlp", 14),
        ("last", "mlp", 9),
    )

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.deep = nn.Conv2d(6, 6, 1, bias=False)
        self.bare = BareNorm(6)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.fixed = nn.BatchNorm2d(8, affine=False)
        self.raw = nn.Parameter(torch.randn(4, 8, 1, 1))
        self.first = nn.Linear(4, 12)
        self.bn = nn.BatchNorm1d(12)
        self.gate = nn.Linear(12, 20)
        self.down = nn.Linear(10, 12)
        self.qkv = nn.Linear(12, 36)
        self.mixed = nn.Linear(12, 12)
        self.encoder = nn.TransformerEncoderLayer(12, 4, 14, activation="gelu", batch_first=True)
        self.hidden = nn.Linear(12, 9)
        self.act = Cube()
        self.last = nn.Linear(9, 5)
        self.unused = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.entry(x))
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.up(self.bare(self.deep(x)))
        x = F.silu(self.fixed(self.plain(x)))
        x = F.avg_pool2d(F.conv2d(x, self.raw).relu(), 4)
        x = self.first(x.flatten(2).transpose(1, 2))
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        a, b = self.gate(x).chunk(2, -1)
        x = x + self.down(a * (0.5 * b * (1 + torch.tanh(0.8 * (b + 0.04 * b**3)))))
        x = x + self.attention(x)
        x = self.encoder(x).mean(1)
        return self.last(F.dropout(self.act(self.hidden(x)), 0.5, self.training))

    def attention(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, 3, 4).permute(3, 0, 2, 1, 4)  # rows by head first, then q, k, v
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return self.mixed((weights @ v).transpose(1, 2).reshape(n, tokens, width))


# ---------------------------------------------------------------- published architectures
class Architecture(NamedTuple):
    build: Callable[[], nn.Module]
    size: int  # of a picture
    expected: dict[str, tuple[int, int]]  # kind: (sites, neurons)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(**options)

    return build


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return build


def _transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


# Stem 64; stages of n blocks (w + w + 4w) and a projection 4w: n = 3, 4, 6, 3, w = 64, 128, 256, 512.
# 64 + 1,408 + 3,584 + 10,240 + 11,264.
RESNET50 = {"batch_norm": (53, 26560)}
# Patch embedding 768; 12 layers of 12 heads and 3,072 hidden units.
VIT_B = {"conv": (1, 768), "heads": (12, 144), "mlp": (12, 36864)}
# Stem 96, three convolutions between stages (192, 384, 768); blocks 3, 3, 9, 3 of width w: a depthwise convolution of w
# channels and 4w hidden units. The widths of the blocks sum to 288 + 576 + 3,456 + 2,304 = 6,624.
CONVNEXT_T = {"conv": (22, 96 + 192 + 384 + 768 + 6624), "mlp": (18, 4 * 6624)}
# Patch embedding 96; blocks 2, 2, 6, 2 of 3, 6, 12, 24 heads and 4 x (96, 192, 384, 768) hidden units.
SWIN_T = {"conv": (1, 96), "heads": (12, 6 + 12 + 72 + 48), "mlp": (12, 4 * (192 + 384 + 2304 + 1536))}
# Stem 32; first block 32 + 16; then twice 6 x in, and out, per block; last 1,280. Every convolution has its BatchNorm.
_V2 = [(16, 24), (24, 24), (24, 32), (32, 32), (32, 32), (32, 64), *[(64, 64)] * 3, (64, 96), *[(96, 96)] * 2]
_V2 += [(96, 160), *[(160, 160)] * 2, (160, 320)]
MOBILENET_V2 = {"batch_norm": (52, 32 + 48 + sum(12 * i + o for i, o in _V2) + 1280)}
_VGG = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512

ARCHITECTURES = {
    "torchvision resnet50": Architecture(_torchvision("resnet50"), 64, RESNET50),
    "torchvision vit_b_16": Architecture(_torchvision("vit_b_16", image_size=32), 32, VIT_B),
    "torchvision convnext_tiny": Architecture(_torchvision("convnext_tiny"), 64, CONVNEXT_T),
    "torchvision swin_t": Architecture(_torchvision("swin_t"), 64, SWIN_T),
    "torchvision mobilenet_v2": Architecture(_torchvision("mobilenet_v2"), 64, MOBILENET_V2),
    # Its classifier is an MLP of two times 4,096 units; in timm the same are convolutions.
    "torchvision vgg16_bn": Architecture(_torchvision("vgg16_bn"), 32, {"batch_norm": (13, _VGG), "mlp": (2, 8192)}),
    "timm resnet50": Architecture(_timm("resnet50"), 64, RESNET50),
    "timm vit_base_patch16": Architecture(_timm("vit_base_patch16_224", img_size=32), 32, VIT_B),
    "timm convnext_tiny": Architecture(_timm("convnext_tiny"), 64, CONVNEXT_T),
    "timm swin_tiny": Architecture(_timm("swin_tiny_patch4_window7_224", img_size=56), 56, SWIN_T),
    "timm mobilenetv2_100": Architecture(_timm("mobilenetv2_100"), 64, MOBILENET_V2),
    "timm vgg16_bn": Architecture(_timm("vgg16_bn"), 32, {"batch_norm": (13, _VGG), "conv": (2, 8192)}),
    "transformers vit": Architecture(_transformers("ViT", image_size=32), 32, VIT_B),
    "transformers resnet": Architecture(_transformers("ResNet"), 64, RESNET50),
}
SMALL = {
    "elu vgg": Architecture(EluVGG, 32, {"batch_norm": (6, 448)}),
    "resnet20, padded shortcuts": Architecture(resnet20, 32, {"batch_norm": (19, 16 + 6 * (16 + 32 + 64))}),
    # Blocks 4 x (16 + 32 + 64 + 128), and a projection in every stage but the first.
    "narrow resnet18": Architecture(narrow_resnet18, 32, {"batch_norm": (20, 16 + 960 + 224)}),
}


# ---------------------------------------------------------------- helpers
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, gains and weights that a fresh model leaves at zero or one, so that every neuron counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eps = 0.03  # not the default, so that a constant in its place shows
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.2, generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:  # zero-initialised heads and biases, layer scales of 1e-6
                parameter.normal_(0, 0.1, generator=generator)
    return model


def make(architecture: Architecture) -> tuple[nn.Module, Tensor]:
    """The randomized model in eval mode, and two pictures."""
    torch.manual_seed(0)
    model = randomize(architecture.build()).eval()
    return model, torch.randn(2, 3, architecture.size, architecture.size)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as it was: the objects in every module and the bits of every tensor."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            plain = value is None or isinstance(value, bool | int | float | str)
            seen[f"{path}:{key}"] = value if plain else id(value)
            if isinstance(value, dict):
                seen[f"{path}:{key} items"] = [(k, id(v)) for k, v in value.items()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"{name} bits"] = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy())
        seen[f"{name} needs gradient"] = tensor.requires_grad
    seen["fast path"] = torch.backends.mha.get_fastpath_enabled()
    seen["random state"] = torch.get_rng_state().numpy().tobytes()
    return seen
