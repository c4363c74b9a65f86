"""MobileNet-V5's encoder, the vision tower of Gemma 3n, in plain PyTorch with the tensor names of its checkpoints.

The architecture is what timm (pytorch-image-models) publishes as `mobilenetv5_300m_enc`: the blocks are MobileNetV4's
(arXiv:2404.10518), with root mean squares over the channels in the place of batch norms. timm itself imports
torchvision, which vlmc does without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import onnx_ops


@dataclass(frozen=True)
class Edge:
    """A fused inverted bottleneck: a 3×3 convolution to four times the channels, and a 1×1 one back."""

    channels: int
    stride: int = 1


@dataclass(frozen=True)
class Bottleneck:
    """A universal inverted bottleneck: depthwise kernels before and within a pair of 1×1 convolutions (0: none)."""

    channels: int
    expansion: int
    start: int = 0
    middle: int = 0
    stride: int = 1


@dataclass(frozen=True)
class Attend:
    """Attention of many queries to one key and value a place; with `stride` these are of a coarser grid."""

    channels: int
    heads: int
    width: int
    stride: int = 1


Block = Edge | Bottleneck | Attend


@dataclass(frozen=True)
class Layout:
    """`stem`: channels of the first convolution. The last two stages' outputs become `side`² vectors of `features`
    values, from a square picture of `image_size` pixels a side."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    features: int
    side: int
    image_size: int


def _repeat(times: int, *blocks: Block) -> tuple[Block, ...]:
    return blocks * times


LAYOUTS = {
    "mobilenetv5_300m_enc": Layout(
        stem=64,
        stages=(
            (Edge(128, stride=2), Edge(128), Edge(128)),
            (
                Bottleneck(256, 6, start=3, middle=5, stride=2),
                *(Bottleneck(256, 4, start=kernel) for kernel in (5, 3, 5, 3)),
            ),
            (
                Bottleneck(640, 6, start=5, middle=5, stride=2),
                *_repeat(7, Bottleneck(640, 4, start=5)),
                Bottleneck(640, 1),
                *_repeat(14, Attend(640, heads=12, width=64, stride=2), Bottleneck(640, 2)),
            ),
            (
                Bottleneck(1280, 6, start=5, middle=5, stride=2),
                *_repeat(19, Attend(1280, heads=16, width=96), Bottleneck(1280, 2)),
            ),
        ),
        features=2048,
        side=16,
        image_size=768,
    )
}


class SameConv(nn.Conv2d):
    """A convolution that gives ⌈size / stride⌉ places and pads the far side more where the padding is odd, also with
    the weight of a fake-quant model in the place of its own."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        if any(pads):
            x = functional.pad(x, [side for pad in pads for side in (pad // 2, pad - pad // 2)])
        convolved: Tensor = super()._conv_forward(x, weight, bias)
        return convolved


class ChannelNorm(nn.Module):
    """x (tiles, channels, height, width) over the root mean square of its channels; with `active`, GELU behind it."""

    def __init__(self, channels: int, active: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]
        return functional.gelu(x, approximate="tanh") if self.active else x


class LayerScale(nn.Module):
    """A learned factor a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, depthwise: bool = False, active: bool = False
) -> nn.Sequential:
    norm = nn.Sequential()
    groups = inputs if depthwise else 1
    norm.add_module("conv", SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False))
    norm.add_module("bn", ChannelNorm(outputs, active))
    return norm


class EdgeBlock(nn.Module):
    def __init__(self, inputs: int, block: Edge) -> None:
        super().__init__()
        self.conv_exp = SameConv(inputs, 4 * inputs, 3, block.stride, bias=False)
        self.bn1 = ChannelNorm(4 * inputs, active=True)
        self.conv_pwl = SameConv(4 * inputs, block.channels, 1, bias=False)
        self.bn2 = ChannelNorm(block.channels)
        self.residual = block.stride == 1 and inputs == block.channels

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.bn2(self.conv_pwl(self.bn1(self.conv_exp(x))))
        return x + made if self.residual else made


class BottleneckBlock(nn.Module):
    """`fusing`: as it stands behind the stages, without a scale and without a residual."""

    def __init__(self, inputs: int, block: Bottleneck, fusing: bool = False) -> None:
        super().__init__()
        inner, outputs = inputs * block.expansion, block.channels
        first = 1 if block.middle else block.stride
        self.dw_start = _conv_norm(inputs, inputs, block.start, first, True) if block.start else nn.Identity()
        self.pw_exp = _conv_norm(inputs, inner, 1, active=True)
        self.dw_mid = (
            _conv_norm(inner, inner, block.middle, block.stride, True, True) if block.middle else nn.Identity()
        )
        self.pw_proj = _conv_norm(inner, outputs, 1)
        self.layer_scale = nn.Identity() if fusing else LayerScale(outputs)
        self.residual = block.stride == 1 and inputs == outputs and not fusing

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer_scale(self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(x)))))
        return x + made if self.residual else made


class Attention(nn.Module):
    """Every place's `heads` queries over one key and one value a place (of the coarser grid, with `stride`)."""

    def __init__(self, channels: int, block: Attend) -> None:
        super().__init__()
        self.heads, self.width = block.heads, block.width
        self.query, self.key, self.value, self.output = (nn.Sequential() for _ in range(4))
        self.query.add_module("proj", SameConv(channels, block.heads * block.width, 1, bias=False))
        for part in (self.key, self.value):
            if block.stride > 1:
                down = SameConv(channels, channels, 3, block.stride, groups=channels, bias=False)
                part.add_module("down_conv", down)
                part.add_module("norm", ChannelNorm(channels))
            part.add_module("proj", SameConv(channels, block.width, 1, bias=False))
        self.output.add_module("proj", SameConv(block.heads * block.width, block.channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        tiles, _, height, width = x.shape
        parts = ((self.query, self.heads), (self.key, 1), (self.value, 1))
        query, key, value = (
            part(x).reshape(tiles, heads, self.width, -1).transpose(2, 3) for part, heads in parts
        )  # (tiles, heads, places, width)
        found, _ = onnx_ops.attention(self, query, key, value, None)
        made: Tensor = self.output(found.flatten(2).transpose(1, 2).reshape(tiles, -1, height, width))
        return made


class AttentionBlock(nn.Module):
    def __init__(self, inputs: int, block: Attend) -> None:
        super().__init__()
        self.norm = ChannelNorm(inputs)
        self.attn = Attention(inputs, block)
        self.layer_scale = LayerScale(block.channels)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer_scale(self.attn(self.norm(x)))
        return x + made


class Fusion(nn.Module):
    """The outputs of the last two stages, the coarser one enlarged, as one of `side` places a side."""

    def __init__(self, inputs: int, features: int, side: int) -> None:
        super().__init__()
        self.ffn = BottleneckBlock(inputs, Bottleneck(features, 2), fusing=True)
        self.norm = ChannelNorm(features)
        self.side = side

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        made = functional.avg_pool2d(self.ffn(torch.cat((fine, coarse), 1)), fine.shape[2] // self.side)
        fused: Tensor = self.norm(made)
        return fused


class MobileNetV5(nn.Module):
    """pixel_values (tiles, 3, image_size, image_size), 0 to 1 → features (tiles, features, side, side)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        kinds: dict[type, type[nn.Module]] = {Edge: EdgeBlock, Bottleneck: BottleneckBlock, Attend: AttentionBlock}
        self.conv_stem = _conv_norm(3, layout.stem, 3, 2, active=True)
        self.conv_stem.conv = SameConv(3, layout.stem, 3, 2)
        channels, stages = layout.stem, []
        for stage in layout.stages:
            blocks: list[nn.Module] = []
            for block in stage:
                blocks.append(kinds[type(block)](channels, block))
                channels = block.channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        fused = sum(stage[-1].channels for stage in layout.stages[-2:])
        self.msfa = Fusion(fused, layout.features, layout.side)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv_stem(pixel_values)
        outputs = []
        for stage in self.blocks:
            x = stage(x)
            outputs.append(x)
        features: Tensor = self.msfa(*outputs[-2:])
        return features
