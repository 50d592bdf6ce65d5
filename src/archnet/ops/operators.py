"""The five operators (Xu et al. 2021, arXiv 2111.01135) and the activation that goes with each.

Every operator is a module whose constructor arguments are given back by ``spec()``, so that a
student is rebuilt from plain data and never from pickled code. Quantizers hang on the slots
``weight_quantizer``, ``bias_quantizer`` and ``quantizer``; an empty slot means float.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Operator(nn.Module):
    """Whatever a student may contain: one of the five operators, an activation, a layout move."""

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain data (JSON)."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec().items())


class WeightedOperator(Operator):
    """An operator that multiplies by a weight: a 3x3 convolution or a fully connected layer.

    ``trainable=False`` marks weights that are constants of the conversion (the 1/n of an average
    pooling, a shift by one pixel): they are quantized like any others but never trained.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, weight_shape: tuple[int, ...], trainable: bool) -> None:
        super().__init__()
        self.trainable = trainable
        self.weight = nn.Parameter(torch.zeros(weight_shape), requires_grad=trainable)
        self.bias = nn.Parameter(torch.zeros(weight_shape[0]), requires_grad=trainable)
        self.weight_quantizer: nn.Module | None = None
        self.bias_quantizer: nn.Module | None = None

    def parameters_on_grid(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the chip will use them (unchanged where nothing is quantized)."""
        weight = (
            self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        )
        bias = self.bias if self.bias_quantizer is None else self.bias_quantizer(self.bias)
        return weight, bias


class Conv3x3(WeightedOperator):
    """3x3 convolution, dense and undilated: (B, C, H, W) -> (B, O, H', W').

    ``padding`` counts the zeros on every side (0 or 1), ``stride`` is 1 or 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        padding: int = 1,
        trainable: bool = True,
    ) -> None:
        super().__init__((out_channels, in_channels, 3, 3), trainable)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.padding = stride, padding

    def spec(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "stride": self.stride,
            "padding": self.padding,
            "trainable": self.trainable,
        }

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters_on_grid()
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class FullyConnected(WeightedOperator):
    """Fully connected layer on the last axis: (B, ..., I) -> (B, ..., O).

    On (B, F) it is a classifier; on (B, H, W, C) it is the same layer at every position. The
    layout moves that bring an axis to the end stand in the student as operators of their own.
    """

    def __init__(self, in_features: int, out_features: int, trainable: bool = True) -> None:
        super().__init__((out_features, in_features), trainable)
        self.in_features, self.out_features = in_features, out_features

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "trainable": self.trainable,
        }

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.parameters_on_grid())


class BatchNorm(Operator):
    """Batch normalization with fixed statistics: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Only a normalization that stands *before* a padded convolution stays an operator; one that
    follows a convolution is folded into it on conversion (exact in eval mode), so that the
    integers which are trained are those which are exported. The statistics are the teacher's
    and stay fixed in training; scale and shift are trained.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def spec(self) -> dict[str, Any]:
        return {"channels": self.channels, "eps": self.eps}

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class MaxPooling(Operator):
    """A maximum over some values: the result lies on the grid of what it reads."""


class MaxPool2x2(MaxPooling):
    """2x2 max-pooling, stride 1 or 2: (B, C, H, W) -> (B, C, H', W').

    ``padding`` is (left, right, top, bottom) in pixels of the lowest value, so that windows of
    any size are built from several of these.
    """

    def __init__(self, stride: int = 2, padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        super().__init__()
        self.stride, self.padding = stride, tuple(padding)

    def spec(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": list(self.padding)}

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, value=-math.inf)
        return F.max_pool2d(x, 2, self.stride)


class Concat(Operator):
    """Concatenation along ``axis``, counted with the batch as axis 0."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis

    def spec(self) -> dict[str, Any]:
        return {"axis": self.axis}

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, self.axis)


class Activation(Operator):
    """The activation quantizer of an operator; ReLU and clipping are its float case.

    Float: y = min(max(x, low), high), with infinite bounds for "no activation". With a quantizer
    in its slot, the clipped value is then rounded to the quantizer's grid.
    """

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        super().__init__()
        self.low, self.high = float(low), float(high)
        self.quantizer: nn.Module | None = None

    def spec(self) -> dict[str, Any]:
        # Infinity is not JSON: an absent bound stands for it.
        bounds = {"low": self.low, "high": self.high}
        return {key: value for key, value in bounds.items() if math.isfinite(value)}

    def forward(self, x: Tensor, values: int | None = None) -> Tensor:
        """Clip and round; ``values`` says how many values a sample has, where x is no batch
        of samples.
        """
        if self.quantizer is not None:
            # A ReLU on an unsigned grid costs no extra pass: the lowest level is its bound. One
            # that shares a grid with negative levels (the two sides of an addition) has to be made.
            low = -math.inf if self.low == getattr(self.quantizer, "low", None) == 0 else self.low
            if math.isfinite(low) or math.isfinite(self.high):
                x = x.clamp(low, self.high)
            return self.quantizer(x) if values is None else self.quantizer(x, values)
        if self.low == 0 and self.high == math.inf:
            return F.relu(x)
        if self.low == -math.inf and self.high == math.inf:
            return x
        return x.clamp(self.low, self.high)
