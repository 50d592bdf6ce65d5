"""Values during conversion: features that exist, and linear forms that do not yet."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Feature:
    """A value of the student, in one or both layouts.

    ``shape`` is (C, H, W) for a map, any other rank otherwise. ``first`` names the value with
    channels first, ``last`` the same value with channels last (H, W, C), where a fully connected
    layer can read it. The builder adds the missing layout when somebody asks for it.
    """

    shape: tuple[int, ...]
    first: str | None = None
    last: str | None = None
    parts: "list[Feature] | None" = None

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 3

    @property
    def channel_axis(self) -> int:
        """Axis of the channels, the batch being axis 0."""
        return 1 if self.is_map else len(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[self.channel_axis - 1]


@dataclass(frozen=True)
class Carry:
    """scale * feature, channel by channel; ``scale`` (C,) or None for one."""

    feature: Feature
    scale: Tensor | None = None

    def scaled(self, scale: Tensor) -> "Carry":
        return replace(self, scale=scale if self.scale is None else self.scale * scale)


@dataclass(frozen=True)
class Convolution:
    """A convolution that was read but not built yet, so that what follows can fold into it.

    ``weight`` is (O, C / groups, kh, kw). ``owner`` is the teacher node it came from.
    """

    feature: Feature
    weight: Tensor
    owner: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def scaled(self, scale: Tensor) -> "Convolution":
        return replace(self, weight=self.weight * scale[:, None, None, None])

    @property
    def is_pointwise(self) -> bool:
        """One weight per channel pair, nothing moved: a matrix at every position."""
        return (
            self.weight.shape[2:] == (1, 1)
            and self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )


Term = Carry | Convolution


@dataclass
class Form:
    """A sum of linear terms and a bias: y = sum_i term_i + bias, shape as the teacher's value.

    Batch norm in eval mode, addition and multiplication by constants only change a form; it is
    built into operators when something that is not linear reads it. That is how batch norms fold
    into convolutions and additions merge with shortcuts, without a rule for each combination.
    Weights and bias are float64 until they are built, so that folding costs no accuracy.
    ``owner`` is the teacher node that gave the form its last term.
    """

    shape: tuple[int, ...]
    terms: list[Term]
    bias: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    owner: str = ""

    @property
    def channels(self) -> int:
        return Feature(self.shape).channels

    def affine(self, scale: Tensor, bias: Tensor) -> "Form":
        """Scale * self + bias with (C,) or (1,) vectors, exact."""
        full = scale.double().expand(self.channels)
        return Form(self.shape, [t.scaled(full) for t in self.terms], self.bias * full + bias)

    def plus(self, other: "Form") -> "Form":
        return Form(self.shape, [*self.terms, *other.terms], self.bias + other.bias)


Value = Feature | Form
