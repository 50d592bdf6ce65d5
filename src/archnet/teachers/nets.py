"""Small teachers for data sets that no published weights fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.teachers.modern import ConvNeXt, MobileNetV3, ViT


def _conv_bn(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut that costs no parameter (He et al. 2015, option A).

    Where the block strides, the shortcut takes every second pixel and pads the missing channels
    with zeros, half of them on each side.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(inputs, outputs, stride)
        self.conv2, self.bn2 = _conv_bn(outputs, outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.missing:
            half = self.missing // 2
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half)
            )
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images with three stages (He et al. 2015, section 4.2; arXiv 1512.03385).

    Args:
        depth: 6n + 2 layers for n blocks a stage: 20, 32, 44, 56, ...
        width: channels of the first stage; the others have twice and four times as many.
    """

    def __init__(
        self, depth: int = 20, width: int = 16, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"depth={depth}: a CIFAR ResNet has 6n + 2 layers (20, 32, 44, 56, ...)"
            )
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = _conv_bn(in_channels, width)
        self.layer1 = self._stage(width, width, 1, blocks)
        self.layer2 = self._stage(width, 2 * width, 2, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks)
        self.linear = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = _BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, 32, 32)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class _Residual(nn.Module):
    """x + conv-bn-relu-conv-bn-relu(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = _conv_bn(channels, channels), _conv_bn(channels, channels)
        self.body = nn.Sequential(*layers[0], nn.ReLU(), *layers[1], nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResNet9(nn.Module):
    """A shallow ResNet whose work lies where a CPU is fast: many channels, few and small maps.

    After the DAWNBench entry of D. Page ("How to train your ResNet", 2018), with max-pooling in
    place of strides. Its multiplications grow with the square of `width`: 24 million at 16, 54 at
    24, 95 at 32, on 32x32 images.
    """

    def __init__(self, width: int = 16, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(in_channels, width), nn.ReLU())
        self.stage1 = self._stage(width, 2 * width)
        self.stage2 = self._stage(2 * width, 4 * width)
        self.block2 = _Residual(4 * width)
        self.stage3 = self._stage(4 * width, 8 * width)
        self.block3 = _Residual(8 * width)
        # Two 2x2 pools rather than one 4x4: both are operators that any target has.
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(2))
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(*_conv_bn(inputs, outputs), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, 32, 32)."""
        x = self.block2(self.stage2(self.stage1(self.stem(x))))
        x = self.pool(self.block3(self.stage3(x)))
        return self.linear(torch.flatten(x, 1))


class DigitNet(nn.Module):
    """Four convolutions for digits of 28x28 pixels."""

    def __init__(self, width: int = 16, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        widths = (in_channels, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for stage in range(4):
            layers += [*_conv_bn(widths[stage], widths[stage + 1]), nn.ReLU()]
            if stage < 3:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W), H and W at least 8."""
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


class SceneNet(nn.Module):
    """A small U-Net (Ronneberger et al. 2015): three scales down and up again, joined by sums."""

    def __init__(self, width: int = 16, num_classes: int = 11, in_channels: int = 1) -> None:
        super().__init__()
        self.fine = self._stage(in_channels, width)
        self.middle = self._stage(width, 2 * width)
        self.coarse = self._stage(2 * width, 4 * width)
        self.context = self._stage(4 * width, 4 * width)
        self.down = nn.MaxPool2d(2)
        self.from_coarse = self._stage(4 * width, 2 * width)
        self.join_middle = self._stage(2 * width, 2 * width)
        self.from_middle = self._stage(2 * width, width)
        self.join_fine = self._stage(width, width)
        self.classes = nn.Conv2d(width, num_classes, 1)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(*_conv_bn(inputs, outputs), nn.ReLU())

    @staticmethod
    def _up(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) of images (B, in_channels, H, W), sides a multiple of 4."""
        fine = self.fine(x)
        middle = self.middle(self.down(fine))
        coarse = self.context(self.coarse(self.down(middle)))
        middle = self.join_middle(self._up(self.from_coarse(coarse)) + middle)
        fine = self.join_fine(self._up(self.from_middle(middle)) + fine)
        return self.classes(fine)


NETS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet": CifarResNet,
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56)},
    "resnet9": ResNet9,
    "digits": DigitNet,
    "scenes": SceneNet,
    "cifar_convnext": ConvNeXt,
    "cifar_vit": ViT,
    "cifar_mobilenet_v3": MobileNetV3,
}
