"""Layout moves: they compute nothing, and are allowed, counted and listed."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import functional as F

from archnet.ops.operators import Operator, Pair

Value = TypeVar("Value")


class LayoutMove(Operator):
    """A move of values that changes none of them."""


class Permute(LayoutMove):
    """Reorder axes; ``order`` counts the batch as axis 0 and leaves it there."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = tuple(order)

    def spec(self) -> dict[str, Any]:
        return {"order": list(self.order)}

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Reshape(LayoutMove):
    """Reshape every sample to ``shape`` (without the batch axis)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def spec(self) -> dict[str, Any]:
        return {"shape": list(self.shape)}

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)


class Slice(LayoutMove):
    """``x[start:stop:step]`` along ``axis`` (the batch is axis 0); bounds are not negative."""

    def __init__(self, axis: int, start: int, stop: int, step: int = 1) -> None:
        super().__init__()
        self.axis, self.start, self.stop, self.step = axis, start, stop, step

    def spec(self) -> dict[str, Any]:
        return {"axis": self.axis, "start": self.start, "stop": self.stop, "step": self.step}

    def forward(self, x: Tensor) -> Tensor:
        index = [slice(None)] * self.axis + [slice(self.start, self.stop, self.step)]
        return x[tuple(index)]


class Pad(LayoutMove):
    """Pad with zeros; ``pads`` lists (before, after) for every axis but the batch."""

    def __init__(self, pads: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.pads = tuple((int(before), int(after)) for before, after in pads)

    def spec(self) -> dict[str, Any]:
        return {"pads": [list(pair) for pair in self.pads]}

    def forward(self, x: Tensor) -> Tensor:
        # F.pad counts from the last axis.
        return F.pad(x, [count for pair in reversed(self.pads) for count in pair])


def windows(
    cut: Callable[[Value, int, int, int, int], Value],
    x: Value,
    shape: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    dilation: Pair,
) -> list[Value]:
    """The kh * kw shifted views of a map under an unpadded window, in row-major order.

    Args:
        cut: what takes ``x[start:stop:step]`` along an axis, of (x, axis, start, stop, step).
        x: a map of ``shape`` (C, H, W).
        kernel, stride, dilation: of the window, (rows, columns).
    """
    spans = [
        (n - d * (k - 1) - 1) // s * s + 1
        for n, k, s, d in zip(shape[1:], kernel, stride, dilation, strict=True)
    ]
    views = []
    for i in range(kernel[0]):
        top = i * dilation[0]
        rows = cut(x, 2, top, top + spans[0], stride[0])
        for j in range(kernel[1]):
            left = j * dilation[1]
            views.append(cut(rows, 3, left, left + spans[1], stride[1]))
    return views
