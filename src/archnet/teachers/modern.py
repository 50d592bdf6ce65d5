"""Small teachers whose operators have no exact five-operator form: approximate rules meet them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _ConvNeXtBlock(nn.Module):
    """x + scale * W2 gelu(W1 layer_norm(depthwise 7x7 (x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        # The published start of 1e-6 is for 300 epochs; a short training does not leave it.
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class _LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map, as ConvNeXt has it between its stages."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022, arXiv 2201.03545) for 32x32 images.

    Args:
        width: channels of the first stage; each further stage has twice as many.
        depths: blocks of each stage; between stages maps are halved.
        patch: side of the square patches that the stem reads.
    """

    def __init__(
        self,
        width: int = 32,
        depths: Sequence[int] = (2, 2, 2),
        patch: int = 2,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, patch, patch), _LayerNorm2d(width)]
        for stage, depth in enumerate(depths):
            if stage:
                layers += [_LayerNorm2d(width), nn.Conv2d(width, 2 * width, 2, 2)]
                width *= 2
            layers += [_ConvNeXtBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W)."""
        return self.linear(self.norm(self.features(x).mean((2, 3))))


class _EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each beside a shortcut."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision Transformer with a class token (Dosovitskiy et al. 2021, arXiv 2010.11929).

    Args:
        dim: width of a token; heads divide it.
        depth: encoder blocks.
        inner: width inside an MLP.
        patch: side of the square patches.
        image_size: side of the images; it fixes the position table.
    """

    def __init__(
        self,
        dim: int = 96,
        depth: int = 5,
        heads: int = 3,
        inner: int = 192,
        patch: int = 4,
        image_size: int = 32,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*(_EncoderBlock(dim, heads, inner) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, image_size, image_size)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = (
            torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        )
        return self.linear(self.norm(self.blocks(tokens))[:, 0])


class _SqueezeExcitation(nn.Module):
    """x * hardsigmoid(W2 relu(W1 mean(x))) (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(8, channels // 4), 1)
        self.excite = nn.Conv2d(max(8, channels // 4), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.excite(y))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class _InvertedResidual(nn.Module):
    """1x1, depthwise 3x3, squeeze and excitation, 1x1; beside a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = expand * inputs
        self.body = nn.Sequential(
            _conv_bn(inputs, inner, 1),
            nn.Hardswish(),
            _conv_bn(inner, inner, 3, stride, inner),
            nn.Hardswish(),
            _SqueezeExcitation(inner),
            _conv_bn(inner, outputs, 1),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNetV3(nn.Module):
    """Inverted residuals with squeeze-excitation and hardswish for 32x32 images.

    After Howard et al. 2019 (arXiv 1905.02244), with three stages and every block excited.

    Args:
        width: channels of the first stage; each further stage has twice as many.
        depths: blocks of each stage; the first block of each halves the map.
        expand: width inside a block over its width outside.
    """

    def __init__(
        self,
        width: int = 16,
        depths: Sequence[int] = (2, 3, 3),
        expand: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(in_channels, width, 3), nn.Hardswish()]
        inputs = width
        for stage, depth in enumerate(depths):
            outputs = width * 2**stage
            for index in range(depth):
                # The first stage halves, too: the maps of the stem are the dearest ones.
                layers.append(_InvertedResidual(inputs, outputs, 2 if index == 0 else 1, expand))
                inputs = outputs
        layers += [_conv_bn(inputs, 4 * inputs, 1), nn.Hardswish()]
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(4 * inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W)."""
        return self.linear(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
