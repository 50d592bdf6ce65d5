"""Whole operators: layers, sums and maxima on whole maps, and the activation that goes with each.

A student is made of them, whatever its target. `archnet.lower` writes each with what a target runs,
for `arch5` the five operators of Xu et al. 2021 (arXiv 2111.01135): 3x3 convolution, 2x2
max-pooling, batch norm, fully connected layer and concatenation.

Every operator is a module whose constructor arguments are given back by ``spec()``, so that a
student is rebuilt from plain data and never from pickled code. Quantizers hang on the slots
``weight_quantizer``, ``bias_quantizer`` and ``quantizer``; an empty slot means float.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Operator(nn.Module):
    """Whatever a student may contain: an operator, an activation, a layout move."""

    def spec(self) -> dict[str, Any]:
        """Constructor arguments as plain data (JSON)."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec().items())


class WeightedOperator(Operator):
    """An operator that multiplies by a weight: a convolution or a fully connected layer.

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
        # Parameters that are on their grids already, by name (`archnet.quant.together`).
        self.on_grid: dict[str, Tensor] = {}

    def parameters_on_grid(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the chip will use them (unchanged where nothing is quantized)."""
        return (
            self._rounded("weight", self.weight, self.weight_quantizer),
            self._rounded("bias", self.bias, self.bias_quantizer),
        )

    def _rounded(self, name: str, value: Tensor, quantizer: nn.Module | None) -> Tensor:
        if name in self.on_grid:
            return self.on_grid[name]
        return value if quantizer is None else quantizer(value)


Pair = tuple[int, int]


def pair(value: int | Sequence[int]) -> Pair:
    """One number for rows and columns, or one for each."""
    first, *rest = (value,) if isinstance(value, int) else value
    return (int(first), int(rest[0]) if rest else int(first))


class Convolution(WeightedOperator):
    """A convolution over a map: (B, C, H, W) -> (B, O, H', W').

    ``kernel``, ``stride``, ``padding`` (zeros on either side) and ``dilation`` are given in pixels,
    as one number or as (rows, columns). With ``groups`` each group of C / groups channels has
    outputs of its own; the weight is (O, C / groups, kh, kw). ``copies`` says that a grouped
    layer's input is one value so many times, one copy after the other (`archnet.quant.copies`):
    a group then reads its channels of every copy.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        copies: int = 1,
        trainable: bool = True,
    ) -> None:
        super().__init__((out_channels, in_channels // groups, *pair(kernel)), trainable)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel, self.stride, self.padding = pair(kernel), pair(stride), pair(padding)
        self.dilation, self.groups, self.copies = pair(dilation), groups, copies

    def spec(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel": list(self.kernel),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "copies": self.copies,
            "trainable": self.trainable,
        }

    @property
    def is_pointwise(self) -> bool:
        """One weight per pair of channels, nothing moved: a matrix at every position."""
        plain = self.kernel == self.stride == (1, 1) and self.padding == (0, 0)
        return plain and self.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1 and self.copies > 1:
            x = by_group(x, self.groups, self.copies)
        weight, bias = self.parameters_on_grid()
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def by_group(x: Tensor, groups: int, copies: int) -> Tensor:
    """Channels (copies, groups, c) of a map as (groups, copies, c)."""
    return x.unflatten(1, (copies, groups, -1)).transpose(1, 2).flatten(1, 3)


class FullyConnected(WeightedOperator):
    """Fully connected layer on the last axis: (B, ..., I) -> (B, ..., O).

    On (B, F) it is a classifier; on (B, H, W, C) it is the same layer at every position. The
    layout moves that bring an axis to the end are operators of their own in the student.
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

    Only a normalization *before* a padded convolution stays an operator; one that
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


class Segments(Operator):
    """Rising lines of every channel between two bounds, side by side: (B, C, ...) -> (B, K C, ...).

    Channel k C + c is min(max(weight[k, c] x_c + bias[k, c], 0), heights[k]). Added up, with signs,
    they are any piecewise-linear function; each is rounded to the grid of the sum.

    Args:
        channels: C.
        heights: of the K segments; None where one has no end.
    """

    bounds: Tensor

    def __init__(self, channels: int, heights: Sequence[float | None]) -> None:
        super().__init__()
        self.channels = channels
        self.heights = [math.inf if height is None else float(height) for height in heights]
        self.weight = nn.Parameter(torch.ones(len(self.heights), channels))
        self.bias = nn.Parameter(torch.zeros(len(self.heights), channels))
        bounds = torch.stack([torch.zeros(len(self.heights)), torch.tensor(self.heights)])
        self.register_buffer("bounds", bounds[..., None], persistent=False)

    def spec(self) -> dict[str, Any]:
        # Infinity is not JSON.
        ends = [height if math.isfinite(height) else None for height in self.heights]
        return {"channels": self.channels, "heights": ends}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, low, high = (
            constant.reshape(*constant.shape, *[1] * (x.dim() - 2))
            for constant in (self.weight, self.bias, *self.bounds)
        )
        # Without a name each value is freed as soon as the next one is there.
        return clipped(torch.addcmul(bias, x.unsqueeze(1), weight), low, high).flatten(1, 2)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        result = torch.clamp(x, low, high)
        ctx.save_for_backward(result == x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


def clipped(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """min(max(x, low), high) with constant bounds, whose gradient is one pass."""
    return cast(Tensor, _Clip.apply(x, low, high))


class AddConstant(Operator):
    """y = x + c with a trained constant c: (B, *shape) -> the same.

    ``shape`` is that of the constant for one sample: one entry along an axis serves all of it (a
    mask has that over windows and heads alike). On a grid it is an offset of what is rounded, as a
    batch norm's shift is. What it adds to real numbers, the scores that a softmax reads, stays
    real.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.bias = nn.Parameter(torch.zeros(self.shape))

    def spec(self) -> dict[str, Any]:
        return {"shape": list(self.shape)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


# What multiplies and shifts every channel, or every element, by numbers of its own.
AFFINE = AddConstant | BatchNorm | Segments


class MaxPooling(Operator):
    """A maximum over some values: the result lies on the grid of what it reads."""


class MaxPool(MaxPooling):
    """Max-pooling: (B, C, H, W) -> (B, C, H', W').

    ``padding`` is (left, right, top, bottom) in pixels of the lowest value; ``kernel``, ``stride``
    and ``dilation`` are one number or (rows, columns).
    """

    def __init__(
        self,
        stride: int | Sequence[int] = 2,
        padding: Sequence[int] = (0, 0, 0, 0),
        kernel: int | Sequence[int] = 2,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        left, right, top, bottom = padding
        self.stride, self.kernel, self.dilation = pair(stride), pair(kernel), pair(dilation)
        self.padding = (left, right, top, bottom)

    def spec(self) -> dict[str, Any]:
        return {
            "stride": list(self.stride),
            "padding": list(self.padding),
            "kernel": list(self.kernel),
            "dilation": list(self.dilation),
        }

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, value=-math.inf)
        return F.max_pool2d(x, self.kernel, self.stride, 0, self.dilation)


class Summing(Operator, ABC):
    """A sum of values of one grid times a number that is the same for all: constants, no weights.

    In integers it is the sum of the integers, which is then requantized; ``factor`` is part of
    that. It is 1 for an addition and 1/n for a mean.
    """

    factor: float = 1.0

    @abstractmethod
    def terms(self, read: Sequence[Sequence[int]]) -> int:
        """How many values each result is the sum of; ``read`` are shapes for one sample."""

    def to_power_of_two(self) -> None:
        """Round the factor to a multiple below 2^7 of a power of two, for chips that requantize by
        shifts alone: an integer, which multiplies the sum, and a shift.
        """
        mantissa, exponent = math.frexp(self.factor)
        self.factor = math.ldexp(round(math.ldexp(mantissa, FACTOR_BITS)), exponent - FACTOR_BITS)


FACTOR_BITS = 7


def split(factor: float) -> tuple[int, float, bool]:
    """A factor as an integer times a unit, and whether the unit is a power of two.

    A factor that is a multiple below 2^7 of a power of two is that multiple; any other is once
    itself. In the second case the unit is the number that a scale in float32 has for it.

    Example: 3/8 is 3 times 1/8; 1/49 is 1 times 0.020408.
    """
    mantissa, exponent = math.frexp(factor)
    number = math.ldexp(mantissa, FACTOR_BITS)
    if number == int(number):
        odd = int(number)
        down = (odd & -odd).bit_length() - 1
        return odd >> down, math.ldexp(1.0, exponent - FACTOR_BITS + down), True
    return 1, float(torch.tensor(math.log(factor)).exp()), False


class Add(Summing):
    """The sum of values of one shape."""

    def terms(self, read: Sequence[Sequence[int]]) -> int:
        return len(read)

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.stack(xs).sum(0) if len(xs) > 2 else torch.add(*xs)


class AveragePool(Summing):
    """``factor`` times the sum over each window, padding being zeros: (B, C, H, W) -> the same.

    ``kernel``, ``stride`` and ``padding`` are one number or (rows, columns).
    """

    def __init__(
        self,
        kernel: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        factor: float,
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = pair(kernel), pair(stride), pair(padding)
        self.factor = factor

    def spec(self) -> dict[str, Any]:
        return {
            "kernel": list(self.kernel),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "factor": self.factor,
        }

    @property
    def is_mean(self) -> bool:
        """Whether what it divides by is the number of pixels in a window."""
        return self.factor == 1 / math.prod(self.kernel)

    def terms(self, read: Sequence[Sequence[int]]) -> int:
        return math.prod(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        sums = F.avg_pool2d(x, self.kernel, self.stride, self.padding, divisor_override=1)
        return sums * self.factor


class Mean(Summing):
    """``factor`` times the sum over some axes, which go; the batch is axis 0.

    A mean where ``factor`` is 1 / their entries, a sum where it is 1.
    """

    def __init__(self, axes: Sequence[int], factor: float) -> None:
        super().__init__()
        self.axes, self.factor = tuple(axes), factor

    def spec(self) -> dict[str, Any]:
        return {"axes": list(self.axes), "factor": self.factor}

    def terms(self, read: Sequence[Sequence[int]]) -> int:
        return math.prod(read[0][axis - 1] for axis in self.axes)

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.axes) * self.factor


class Concat(Operator):
    """Concatenation along ``axis``, counted with the batch as axis 0."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis

    def spec(self) -> dict[str, Any]:
        return {"axis": self.axis}

    def forward(self, *xs: Tensor) -> Tensor:
        first, axis = xs[0], self.axis
        if first.shape[axis] == 1 and all(x is first for x in xs):
            # Copies of a single entry are a view.
            return first.expand(*first.shape[:axis], len(xs), *first.shape[axis + 1 :])
        return torch.cat(xs, axis)


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
        # Infinity is not JSON: an absent bound means infinity.
        bounds = {"low": self.low, "high": self.high}
        return {key: value for key, value in bounds.items() if math.isfinite(value)}

    def forward(self, x: Tensor, values: int | None = None) -> Tensor:
        """Clip and round; ``values`` says how many values a sample has, where x is no batch
        of samples.
        """
        if self.quantizer is not None:
            x = self._cut(x)
            return self.quantizer(x) if values is None else self.quantizer(x, values)
        if self.low == 0 and self.high == math.inf:
            return F.relu(x)
        if self.low == -math.inf and self.high == math.inf:
            return x
        return x.clamp(self.low, self.high)

    def passed(self, x: Tensor, given: Tensor) -> Tensor:
        """The gradient at x where that of the rounded result is ``given``; 0 outside the grid."""
        cut, quantizer = self._cut(x), cast(Any, self.quantizer)
        return quantizer.passed(cut, given if cut is x else given * (cut == x))

    def _cut(self, x: Tensor) -> Tensor:
        """What the quantizer rounds."""
        # A ReLU on an unsigned grid costs no extra pass: the lowest level is its bound. One
        # that shares a grid with negative levels (the two sides of an addition) has to be made.
        low = -math.inf if self.low == getattr(self.quantizer, "low", None) == 0 else self.low
        if math.isfinite(low) or math.isfinite(self.high):
            x = x.clamp(*(bound if math.isfinite(bound) else None for bound in (low, self.high)))
        return x
