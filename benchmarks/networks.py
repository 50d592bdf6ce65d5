"""Networks as factories for ``teacher.factory``: of other packages, and of several results."""

import torch
from torch import Tensor, nn


def efficientnet_lite0() -> nn.Module:
    """The network of the package `efficientnet_lite_pytorch`, with random weights."""
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    return EfficientNet.from_name("efficientnet-lite0")


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class RawHeads(nn.Module):
    """A detector's raw heads at two scales, for grey images; random weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fine = nn.Sequential(_stage(1, 16, 2), _stage(16, 32, 1))
        self.coarse = nn.Sequential(_stage(32, 64, 2), _stage(64, 64, 1))
        self.heads = nn.ModuleList(nn.Conv2d(channels, 27, 1) for channels in (32, 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, 27, H / 2, W / 2) and (B, 27, H / 4, W / 4)."""
        fine = self.fine(x)
        return [self.heads[0](fine), self.heads[1](self.coarse(fine))]


class EmbeddingAndMap(RawHeads):
    """The features of the coarse scale as a map, and an embedding of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """``embedding`` (B, 32) and ``map`` (B, 64, H / 4, W / 4)."""
        features = self.coarse(self.fine(x))
        return {"embedding": self.embed(features.mean((2, 3))), "map": features}


class Inverted(nn.Module):
    """An inverted residual with SiLU and squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = 4 * inputs
        self.is_residual = inputs == outputs and stride == 1
        self.expand = nn.Sequential(nn.Conv2d(inputs, inner, 1), nn.BatchNorm2d(inner), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner), nn.BatchNorm2d(inner), nn.SiLU()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inner, inputs, 1),
            nn.SiLU(),
            nn.Conv2d(inputs, inner, 1),
            nn.Sigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(inner, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.is_residual else y


def fashion_net() -> nn.Module:
    """A classifier of grey images of 28x28 with ten classes, for `benchmarks/fashion.py`."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        Inverted(16, 16, 1),
        Inverted(16, 24, 2),
        Inverted(24, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
