"""A piece of the work of running a student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from archnet.ops.graph import Step
from archnet.ops.layout import LayoutMove
from archnet.ops.operators import Activation, Concat, MaxPooling


@dataclass
class Piece:
    """One piece of work: a step alone.

    ``names`` are the values it computes, ``reads`` those it computes them from, ``dropped`` those
    that nobody reads after it.
    """

    names: tuple[str, ...]
    reads: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The values ``names``; ``live`` holds all that is known by now."""
        return [operators[self.names[0]](*[live[name] for name in self.reads])]


def place_of(name: str, by_name: Mapping[str, Step], operators: nn.ModuleDict) -> str | None:
    """The activation whose values arrive, only moved, at ``name``."""
    while name in by_name:
        step = by_name[name]
        module = operators[name]
        if isinstance(module, Activation):
            return name
        if not isinstance(module, LayoutMove | MaxPooling | Concat) or len(set(step.inputs)) > 1:
            return None
        (name,) = set(step.inputs)
    return None
