"""A piece of the work of running a student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


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
