"""Values during conversion: features that exist, and linear forms that do not yet."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Feature:
    """A value of the student, in one or both layouts.

    ``axis`` is that of the channels, the batch being axis 0; where it is not given, a value of
    three axes is a map (C, H, W) and any other has its channels last. ``first`` names the value
    in the order of ``shape``, ``last`` the same value with the channels moved to the end, where a
    fully connected layer can read it. The builder adds the missing layout when somebody asks for
    it.
    """

    shape: tuple[int, ...]
    first: str | None = None
    last: str | None = None
    parts: "list[Feature] | None" = None
    axis: int = 0

    def __post_init__(self) -> None:
        self.axis = self.axis or default_axis(self.shape)

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 3 and self.axis == 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis - 1] if self.shape else 1


def default_axis(shape: tuple[int, ...]) -> int:
    """Where channels are taken to be when nothing tells."""
    return 1 if len(shape) == 3 else len(shape)


def resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """``shape`` with another size on one axis (the batch is axis 0 and not in it)."""
    return (*shape[: axis - 1], size, *shape[axis:])


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

    A linear layer is one of 1x1. ``weight`` is (O, C / groups, kh, kw), ``owner`` the teacher node
    it came from; without ``trainable`` its weights are constants of the conversion.
    """

    feature: Feature
    weight: Tensor
    owner: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    trainable: bool = True

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
    A term whose feature has one position where the form has many is the same at all of them.
    Weights and bias are float64 until they are built, so that folding costs no accuracy.
    ``owner`` is the teacher node that gave the form its last term.
    """

    shape: tuple[int, ...]
    terms: list[Term]
    bias: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    owner: str = ""
    axis: int = 0

    def __post_init__(self) -> None:
        self.axis = self.axis or default_axis(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[self.axis - 1]

    def affine(self, scale: Tensor, bias: Tensor) -> "Form":
        """Scale * self + bias with (C,) or (1,) vectors, exact."""
        full = scale.double().expand(self.channels)
        terms = [term.scaled(full) for term in self.terms]
        return Form(self.shape, terms, self.bias * full + bias, axis=self.axis)

    def plus(self, other: "Form") -> "Form":
        terms = [*self.terms, *other.terms]
        return Form(self.shape, terms, self.bias + other.bias, axis=self.axis)

    def is_spread(self, term: "Term") -> bool:
        """Whether a term has one position where the form has many."""
        return math.prod(term.feature.shape) == term.feature.channels and (
            math.prod(self.shape) > self.channels
        )

    @property
    def has_spread(self) -> bool:
        return any(map(self.is_spread, self.terms))

    @property
    def is_pointwise(self) -> bool:
        """Every term is a matrix or a scale at every position."""
        return all(isinstance(term, Carry) or term.is_pointwise for term in self.terms)


Value = Feature | Form
