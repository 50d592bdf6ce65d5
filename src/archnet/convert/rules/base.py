"""What a rule is, and the register of all rules."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from archnet.capture import Batch, Ref, TeacherNode
from archnet.convert.builder import Builder, ConversionError
from archnet.convert.calibration import Calibration
from archnet.convert.feature import Carry, Convolution, Feature, Form, Value, resized
from archnet.convert.fit import regression, rows
from archnet.errors import ArchnetError
from archnet.ops import Concat, Reshape

Reads = Callable[[TeacherNode, "Approximation"], list[str]]
# What an operator with several results gives; `getitem` picks from it.
Values = Value | list[Value]


@dataclass(frozen=True)
class Approximation:
    """Which form approximate rules give to what has no exact one.

    Attributes:
        attention: `mixing`, fixed weights over tokens; or `context`, with those between two
            rectified layers, which let a query meet keys and values; or `pairs`, attention itself
            with hinges for its products.
        attention_hinges: of a product of two numbers, in `pairs`.
        hinges: of a smooth activation where they are worth their cost; with 0 each is one clipped
            line for every channel, which is free.
        norm_hinges: of a layer norm where they are worth their cost; with 0 each is one scale and
            shift for every channel, which is free.
        gate_hinges: of the product of a feature and its gate, where they are worth their cost; with
            0 every gate is a sum.
        min_gain: share of the compact form's error that a faithful form must save; one that saves
            less is not built. With 0 every one is.
        max_macs: most multiply-accumulates of the student, as a multiple of the teacher's: those
            nodes take their faithful form where it saves most error for its cost
            (`archnet.convert.budget`). None: all that are worth it.
        max_cost: the same of cycles by the target's own costs (`hardware.costs`), as a multiple of
            what they give the teacher on a target that has every operator.
        compact: nodes that take their compact form, each with the values it reads.
    """

    attention: str = "context"
    attention_hinges: int = 8
    hinges: int = 3
    norm_hinges: int = 3
    gate_hinges: int = 4
    min_gain: float = 0.03
    max_macs: float | None = None
    max_cost: float | None = None
    compact: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Alternative:
    """A node in its faithful form that could have a compact one.

    Attributes:
        reads: the values that the compact form reads.
        compact, faithful: the errors |student - teacher| / |teacher| of the two forms at the
            node's output, both on what the student has in front of it.
    """

    reads: tuple[str, ...]
    compact: float
    faithful: float

    def saves_less_than(self, share: float) -> bool:
        """Whether the faithful form saves less than a share of the compact one's error."""
        return bool(share) and self.faithful > (1 - share) * self.compact


@dataclass
class Site:
    """Where a rule is applied: the node, the values converted so far, and the builder.

    ``batches`` says for every value of the teacher where its samples lie. ``exact`` is what the
    report says of the node: a rule that fits sets it to False. ``alternative`` is set by a rule
    that builds a faithful form and knows a compact one.
    """

    node: TeacherNode
    values: Mapping[str, Values]
    builder: Builder
    batches: Mapping[str, Batch]
    calibration: Calibration | None = None
    approximation: Approximation = Approximation()
    exact: bool = field(default=True, init=False)
    alternative: Alternative | None = field(default=None, init=False)

    def argument(self, name: str) -> Any:
        """An argument of the operator, by the name in its schema."""
        return self.node.arguments[name]

    def value(self, name: str) -> Value:
        """The converted value that an argument refers to; a constant becomes a value as well."""
        return self.operand(self.argument(name))

    def operand(self, item: Any) -> Value:
        """The same of an argument's value, or of one in a list."""
        if isinstance(item, Tensor):
            return self.builder.constant(sample_of(self.node, item))
        if not isinstance(item, Ref):
            raise self.error(f"reads {item} where a tensor is expected")
        return self.referred(item)

    def referred(self, reference: Ref) -> Value:
        """The converted value of a node that gives one."""
        found = self.values[reference.name]
        assert not isinstance(found, list)
        return found

    def fixed(self, name: str) -> Tensor | None:
        """An argument that is a constant of the teacher, in float64; None where it is absent.

        Raises:
            ConversionError: it depends on the input.
        """
        found = self.node.arguments.get(name)
        if isinstance(found, Ref):
            raise self.error(
                f"its {name} depends on the input, and layers need a constant: compute it from "
                "weights alone, or leave this operator out"
            )
        return None if found is None else constant(torch.as_tensor(found))

    def feature(self, name: str) -> Feature:
        """`value`, built into operators if it was a linear form."""
        return self.builder.build(self.value(name))

    def form(self, name: str) -> Form:
        """The same as a linear form."""
        return as_form(self.value(name))

    @property
    def subject(self) -> str:
        """The name of the operator's first argument; schemas call it self or input."""
        return next(iter(self.node.arguments))

    def pair(self, name: str) -> tuple[int, int]:
        """An argument given as one integer, [n] or [n, m]."""
        value = self.argument(name)
        items = [value] if isinstance(value, int) else list(value)
        return (items[0], items[-1])

    # -- axes ----------------------------------------------------------------------------------

    @property
    def batch(self) -> Batch:
        """Where the samples of the operator's first argument lie."""
        return self.batches[self.node.refs()[0]]

    def axis(self, dim: int) -> int:
        """An axis of the operator's first argument as the student's axis."""
        batch = self.batch
        if dim % batch.rank == batch.axis and batch.folded == 1:
            raise self.error(
                "works along the batch, whose samples a student never sees together: give it "
                "another axis"
            )
        return batch.student_axis(dim)

    def require_batch_ahead(self, axes: int) -> None:
        """
        Raises:
            ConversionError: the samples of the first argument lie within its last ``axes`` axes.
        """
        if self.batch.axis >= self.batch.rank - axes:
            raise self.error(
                f"works along the batch, which lies in axis {self.batch.axis} here: put the batch "
                "first (permute, or batch_first=True)"
            )

    def tagged(self, name: str, axis: int) -> Value:
        """An argument, its channels taken to be at one axis."""
        return self.builder.tagged(self.value(name), axis)

    def constant(self, tensor: Tensor) -> Tensor:
        """A constant of the teacher at every element of the result: (*shape), float64."""
        return at_elements(self.node, tensor)

    # -- fits ----------------------------------------------------------------------------------

    def wanted(self) -> Tensor:
        """What the teacher gives here on the calibration inputs: (B, *shape)."""
        return self._fitting.target(self.node)

    def given(self, value: Value) -> Tensor:
        """The student's value on the calibration inputs: (B, *shape)."""
        return self._fitting.value(value)

    def hold(self, feature: Feature, value: Tensor) -> None:
        """Say what a feature is on the calibration inputs (B, *shape), where a fit has found it."""
        self._fitting.hold(feature, value)

    @property
    def is_compact(self) -> bool:
        """Whether a compact form is asked for here."""
        return self.node.name in self.approximation.compact

    @property
    def _fitting(self) -> Calibration:
        self.exact = False
        if self.calibration is None:
            raise self.error("has no exact form and is fitted to inputs: give calibration")
        return self.calibration

    def error(self, reason: str) -> ConversionError:
        return error_at(self.node, reason)


@dataclass(frozen=True)
class Rule:
    """A rewrite: the operators it matches, and what it builds.

    ``reads`` names the values that the rewrite needs; the others, and whatever is computed for
    them alone, have no part in the student. All of them where it is None.
    """

    name: str
    operators: tuple[str, ...]
    apply: Callable[[Site], Values]
    reads: Reads | None = None

    @property
    def file(self) -> str:
        """Where the rule is written, from the repository's root."""
        return f"src/{self.apply.__module__.replace('.', '/')}.py"

    def applied(self, site: Site) -> Values:
        """What the rule builds.

        A value that is one number a sample, with no axis of its own, is given to rules as one of
        a single entry where all that they read is so.

        Raises:
            ConversionError: the rule says what cannot be, or has a fault.
        """
        try:
            return self.apply(site) if _has_axes(site) else _with_axis(site, self.apply)
        except ArchnetError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise site.error(
                f"{self.file} fails with {type(error).__name__} ({reason}). This is a bug in the "
                "rule; please report it with this operator's code. Until it is fixed, write this "
                "part of the network another way"
            ) from error


RULES: dict[str, Rule] = {}


def rule(
    *operators: str, reads: Reads | None = None
) -> Callable[[Callable[[Site], Values]], Callable[[Site], Values]]:
    """Register a rewrite for ATen operators (`aten.<name>.<overload>`)."""

    def register(apply: Callable[[Site], Values]) -> Callable[[Site], Values]:
        entry = Rule(apply.__name__, operators, apply, reads)
        for operator in operators:
            RULES[operator] = entry
        return apply

    return register


def _has_axes(site: Site) -> bool:
    found = [site.values.get(name) for name in site.node.refs()]
    return bool(site.node.shape) or any(isinstance(v, list) or v.shape for v in found if v)


def _with_axis(site: Site, apply: Callable[[Site], Values]) -> Values:
    """A rule on numbers without an axis, as values of one entry; to the rule the batch is still
    the only axis of the teacher, so that it works along none.
    """
    names, builder = site.node.refs(), site.builder
    values = {
        name: builder.reshape(builder.build(site.referred(Ref(name))), (1,)) for name in names
    }
    inner = replace(
        site,
        node=replace(site.node, shape=(1,)),
        values={**site.values, **values},
    )
    made = apply(inner)
    site.exact, site.alternative = inner.exact, inner.alternative
    assert not isinstance(made, list)
    return builder.reshape(builder.build(made), ())


def error_at(node: TeacherNode, reason: str) -> ConversionError:
    return ConversionError(f"{node.operator} {node.place}: {reason}")


def as_form(value: Value) -> Form:
    return value if isinstance(value, Form) else Form(value.shape, [Carry(value)], axis=value.axis)


def number(value: float) -> Tensor:
    return torch.full((1,), float(value), dtype=torch.float64)


def affine(site: Site, value: Value, scale: Tensor, shift: Tensor) -> Value:
    """Scale * x + shift with constants that broadcast as the teacher's do, and x as well.

    Along one axis they belong to its entries, whatever the axis was taken for before; otherwise
    every element has its own.
    """
    if not all(bool(item.isfinite().all()) for item in (scale, shift)):
        raise site.error(
            "scales or shifts by a number that is not finite: use a large number, such as -1e4 in "
            "a mask"
        )
    value = stretched(site, value)
    if bool((scale == 1).all()) and not bool(shift.any()):
        return value
    if scale.numel() == shift.numel() == 1:
        return as_form(value).affine(scale.reshape(1), shift.reshape(1))
    return at_each(site, value, torch.stack([site.constant(scale), site.constant(shift)]))


def stretched(site: Site, value: Value) -> Value:
    """A value in the shape of the node's result: copies side by side along axes of one entry."""
    return spread_to(site, value, site.node.shape)


def spread_to(site: Site, value: Value, shape: tuple[int, ...]) -> Value:
    """A value in a shape that it broadcasts to."""
    builder, new = site.builder, len(shape) - len(value.shape)
    ahead = (*(1,) * new, *value.shape)
    fits = len(ahead) == len(shape) and all(
        have in (1, want) for have, want in zip(ahead, shape, strict=True)
    )
    if not fits:
        raise site.error(
            f"broadcasts {value.shape} to {shape} within a sample; only axes of one entry broadcast"
        )
    if new:
        axis = value.axis + new if value.shape else 1
        value = builder.layout(builder.build(value), "axes", Reshape(ahead), axis)
    for axis, (have, want) in enumerate(zip(value.shape, shape, strict=True), 1):
        if have != want:
            value = joined(site, [builder.build(value)] * want, axis)
    return value


def joined(site: Site, features: Sequence[Feature], axis: int) -> Feature:
    """Concatenation along any axis of the student, channels or not."""
    builder, channels = site.builder, features[0].axis
    if axis == channels and all(f.axis == axis for f in features):
        return builder.concat(features)
    if len(features) == 1:
        return features[0]
    name = builder.emit("concat", Concat(axis), *map(builder.first, features))
    shape = resized(features[0].shape, axis, sum(f.shape[axis - 1] for f in features))
    return Feature(shape, first=name, axis=channels)


def at_each(site: Site, value: Value, full: Tensor) -> Value:
    """A scale and a shift of its own for every element, (2, *shape); along one axis where that is
    all they vary with.
    """
    moving = [
        axis for axis in range(1, full.dim()) if bool((full != full.narrow(axis, 0, 1)).any())
    ]
    if len(moving) > 1:
        feature = site.builder.build(value)
        if bool((full[0] == 1).all()):
            return site.builder.add_constant(feature, full[1])
        return site.builder.element_affine(feature, full[0], full[1])
    (axis,) = moving or [value.axis]
    vectors = full.movedim(axis, 1).reshape(2, full.shape[axis], -1)[:, :, 0]
    return as_form(site.builder.tagged(value, axis)).affine(vectors[0], vectors[1])


def matrix_on(site: Site, value: Value, weight: Tensor, bias: Tensor) -> Form:
    """The form W x + b at every position, with ``weight`` (O, C) and ``bias`` (O,).

    Scales and shifts in front (a batch norm without an activation) go into the weights:
    W (s x + t) + b = (W s) x + (W t + b).
    """
    shape = (*value.shape[: value.axis - 1], len(weight), *value.shape[value.axis :])

    def term(feature: Feature, matrix: Tensor) -> Convolution:
        return Convolution(feature, matrix[:, :, None, None], site.node.name)

    if isinstance(value, Form):
        carries = [t for t in value.terms if isinstance(t, Carry)]
        wide = [t for t in value.terms if not value.is_spread(t)]
        if len(carries) == len(value.terms) and len(wide) == 1:
            terms = [
                term(t.feature, weight if t.scale is None else weight * t.scale) for t in carries
            ]
            offset = bias + weight @ value.bias.expand(weight.shape[1])
            return Form(shape, [*terms], offset, axis=value.axis)
    return Form(shape, [term(site.builder.build(value), weight)], bias, axis=value.axis)


def scaled_to_fit(site: Site, value: Value) -> Value:
    """A x + b, for every channel the a and b that come nearest to the teacher (least squares)."""
    if not value.shape:
        one = site.builder.reshape(site.builder.build(value), (1,))
        inner = replace(site, node=replace(site.node, shape=(1,)))
        fitted = site.builder.build(scaled_to_fit(inner, one))
        site.exact = inner.exact
        return site.builder.reshape(fitted, ())
    x, wanted = rows(site.given(value), value.axis), rows(site.wanted(), value.axis)
    slopes, offset = regression([x], wanted)
    return as_form(value).affine(slopes[:, 0], offset)


def constant(tensor: Tensor) -> Tensor:
    """A weight of the teacher in the precision that rules compute in (float64, on the CPU)."""
    return tensor.detach().double().cpu()


def by_map(work: Callable[[Site], Values]) -> Callable[[Site], Values]:
    """A rule for maps (C, H, W) whose channels do not meet serves several images a sample as well.

    Frames of a video, or windows, (N, C, H, W), are joined with the batch in the teacher: here
    their channels are beside each other. One map (H, W) is one channel.
    """

    @functools.wraps(work)
    def wrapped(site: Site) -> Values:
        (name, *_), builder = site.node.refs(), site.builder
        value = site.referred(Ref(name))
        site.require_batch_ahead(2)
        if len(value.shape) == 3 and site.batch.axis == 0:
            return work(site)
        *ahead, height, width = value.shape
        maps = Reshape((math.prod(ahead), height, width))
        flat = builder.layout(builder.build(value), "maps", maps, 1)
        shape = site.node.shape
        node = replace(site.node, shape=(math.prod(shape[:-2]), *shape[-2:]), batch=Batch(4))
        values = {**site.values, name: flat}
        made = work(
            replace(site, node=node, values=values, batches={**site.batches, name: Batch(4)})
        )

        def images(value: Value) -> Value:
            full = shape or (*ahead, *value.shape[1:])  # of several results the node says none
            axis = max(len(full) - 2, 0)
            return builder.layout(builder.build(value), "images", Reshape(full), axis)

        return [images(value) for value in made] if isinstance(made, list) else images(made)

    return wrapped


def at_elements(node: TeacherNode, tensor: Tensor) -> Tensor:
    """A constant of the teacher at every element of a node's result: (*shape), float64."""
    return sample_of(node, tensor).expand(node.shape)


def sample_of(node: TeacherNode, tensor: Tensor) -> Tensor:
    """A constant that a node reads as one sample has it, with the axes of the node's result."""
    batch = node.batch
    full = constant(tensor)[(None,) * (batch.rank - tensor.dim())]
    if batch.folded == 1:
        shape = (*full.shape[: batch.axis], *full.shape[batch.axis + 1 :])
    else:
        full = full.expand(*full.shape[: batch.axis], batch.folded, *full.shape[batch.axis + 1 :])
        shape = tuple(full.shape)
    if full.numel() != math.prod(shape):
        raise error_at(node, "reads a constant that has an entry for every sample of a batch")
    return full.reshape(shape)
