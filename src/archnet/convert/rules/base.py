"""What a rule is, and the register of all rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from archnet.capture import Ref, TeacherNode
from archnet.convert.builder import Builder, ConversionError
from archnet.convert.feature import Carry, Feature, Form, Value


@dataclass(frozen=True)
class Site:
    """Where a rule is applied: the node, the values converted so far, and the builder."""

    node: TeacherNode
    values: Mapping[str, Value]
    builder: Builder

    def argument(self, name: str) -> Any:
        """An argument of the operator, by the name in its schema."""
        return self.node.arguments[name]

    def value(self, name: str) -> Value:
        """The converted value that an argument refers to."""
        reference = self.argument(name)
        if not isinstance(reference, Ref):
            raise self.error(f"argument {name} is a constant where a feature is expected")
        return self.values[reference.name]

    def feature(self, name: str) -> Feature:
        """The same, built into operators if it was a linear form."""
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

    def error(self, reason: str) -> ConversionError:
        return ConversionError(f"{self.node.operator} at '{self.node.path}': {reason}")


@dataclass(frozen=True)
class Rule:
    """A rewrite: the operators it matches, what it builds, and whether it is exact."""

    name: str
    operators: tuple[str, ...]
    exact: bool
    apply: Callable[[Site], Value]


RULES: dict[str, Rule] = {}


def rule(
    *operators: str, exact: bool = True
) -> Callable[[Callable[[Site], Value]], Callable[[Site], Value]]:
    """Register a rewrite for ATen operators (`aten.<name>.<overload>`)."""

    def register(apply: Callable[[Site], Value]) -> Callable[[Site], Value]:
        entry = Rule(apply.__name__, operators, exact, apply)
        for operator in operators:
            RULES[operator] = entry
        return apply

    return register


def as_form(value: Value) -> Form:
    return value if isinstance(value, Form) else Form(value.shape, [Carry(value)])


def constant(tensor: Tensor) -> Tensor:
    """A weight of the teacher in the precision that rules compute in (float64, on the CPU)."""
    return tensor.detach().double().cpu()
