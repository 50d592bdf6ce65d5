"""How a part of a student is run: the same values as step by step, in fewer and larger pieces."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from archnet.ops.graph import Step
from archnet.ops.hinges import HingeLines, HingeSum
from archnet.ops.operators import Activation, Convolution, Segments
from archnet.ops.parts import partings
from archnet.ops.piece import Piece
from archnet.ops.tables import Tabled


def plan(steps: Sequence[Step], operators: nn.ModuleDict, targets: Sequence[str]) -> list[Piece]:
    """The steps as pieces of work, in order.

    - Lines of numbers, what rounds them and what adds them are one function of the numbers
      (`archnet.ops.tables`): on a grid it is a table.
    - Slices that part a whole axis are one split, whose gradient is one concatenation; every slice
      alone would fill a whole tensor with zeros.
    """
    functions = _functions(steps, operators)
    needed, chosen = set(targets), []
    for step in reversed(steps):
        if step.name in needed:
            needed.update(functions[step.name].reads if step.name in functions else step.inputs)
            chosen.append(step)
    chosen.reverse()
    together = dict(functions)
    for parting in partings(chosen, operators):
        names = tuple(parting.cuts)
        together[names[0]] = Split(
            names, (parting.source,), axis=parting.axis, bounds=parting.bounds
        )
    done: set[str] = set()
    pieces: list[Piece] = []
    for step in chosen:
        if step.name in done:
            continue
        piece = together.get(step.name) or Piece((step.name,), step.inputs)
        done.update(piece.names)
        pieces.append(piece)
    read_later: set[str] = set()
    for piece in reversed(pieces):
        # A target that nobody reads any more is dropped once it has been given.
        ends = dict.fromkeys([*piece.names, *piece.reads])
        piece.dropped = tuple(name for name in ends if name not in read_later)
        read_later.update(piece.reads)
    return pieces


# Functions of single numbers --------------------------------------------------------------------


def _functions(steps: Sequence[Step], operators: nn.ModuleDict) -> dict[str, Piece]:
    """Lines, what rounds them, what adds them up and, for segments, what rounds the sum; by the
    name of the last step.
    """
    by_name = {step.name: step for step in steps}
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.inputs:
            readers.setdefault(name, []).append(step)

    def chain(first: Step, *kinds: type[nn.Module]) -> list[Step]:
        """A step and those of the given kinds after it, each the only reader of the one before."""
        found = [first]
        for kind in kinds:
            after = readers.get(found[-1].name, [])
            if len(after) != 1 or not isinstance(operators[after[0].name], kind):
                break
            found.append(after[0])
        return found

    found: dict[str, Piece] = {}
    for step in steps:
        if isinstance(operators[step.name], Segments):
            members = chain(step, Activation, Convolution, Activation)
        elif isinstance(operators[step.name], HingeLines):
            members = chain(step, Activation, HingeSum)
        else:
            continue
        if len(members) > 2:
            found[members[-1].name] = Tabled(members, by_name, operators)
    return found


# Slices ---------------------------------------------------------------------------------------


@dataclass
class Split(Piece):
    """Slices that follow one another on ``axis``, parted at ``bounds``."""

    axis: int = 0
    bounds: tuple[int, ...] = ()

    def work(self, operators: nn.ModuleDict, live: Mapping[str, Tensor]) -> Sequence[Tensor]:
        x = live[self.reads[0]]
        if x.shape[self.axis] == self.bounds[-1]:
            return x.split([b - a for a, b in itertools.pairwise(self.bounds)], self.axis)
        return [operators[name](x) for name in self.names]
