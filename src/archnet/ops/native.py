"""What a target computes by itself, where it has an operator for it: no five operators do.

Its bits are the target's own. The golden model and training give the meaning: what is read, in real
numbers, rounded once onto the grid of the result.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.ops.operators import Operator
from archnet.ops.sequence import MatMul, Softmax

# By the name that a target's description has for it.
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "erf": torch.erf,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "sin": torch.sin,
    "cos": torch.cos,
}


class Function(Operator):
    """A function of single numbers, one of `FUNCTIONS`.

    ``parts`` says that a GELU is written as x (1 + erf(x / sqrt(2))) / 2, for a target that has
    these operators instead.
    """

    def __init__(self, kind: str, parts: bool = False) -> None:
        super().__init__()
        self.kind, self.parts = kind, parts

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "parts": self.parts}

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.kind](x)


class LayerNorm(Operator):
    """Layer normalization over the last axis: (B, ..., C), with a trained scale and shift."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def spec(self) -> dict[str, Any]:
        return {"channels": self.channels, "eps": self.eps}

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.channels,), self.weight, self.bias, self.eps)


class Multiply(Operator):
    """The product of two values, of which one may have single entries where the other has many."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


NATIVE = Function | LayerNorm | Multiply | MatMul | Softmax
