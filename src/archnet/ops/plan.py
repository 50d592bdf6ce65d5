"""How a part of a student is run: the same values as step by step, in fewer and larger pieces."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from archnet.ops.graph import Step
from archnet.ops.layout import Slice
from archnet.ops.pairs import copies, hinges_of_sums
from archnet.ops.piece import Piece
from archnet.ops.tables import functions_of_levels


def plan(
    steps: Sequence[Step],
    operators: nn.ModuleDict,
    shapes: Mapping[str, tuple[int, ...]],
    targets: Sequence[str],
) -> list[Piece]:
    """The steps as pieces of work, in order.

    - Hinges of a sum that are added up (attention by pairs of tokens) are one function of the sum,
      computed at once (`archnet.ops.pairs`): there are too many of them to exist for every pair.
      Copies along an axis are views.
    - What segments make of single numbers between two grids (a smooth activation) is looked up in a
      table (`archnet.ops.tables`).
    - Slices that part a whole axis are one split, whose gradient is one concatenation; every slice
      alone would fill a whole tensor with zeros.
    """
    bent: dict[str, Piece] = {
        **functions_of_levels(steps, operators),
        **hinges_of_sums(steps, operators, shapes),
    }
    needed, chosen = set(targets), []
    for step in reversed(steps):
        if step.name in needed:
            needed.update(bent[step.name].reads if step.name in bent else step.inputs)
            chosen.append(step)
    chosen.reverse()
    together: dict[str, Piece] = {
        **bent,
        **copies(chosen, operators, shapes),
        **_parts(chosen, operators),
    }
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


def _parts(steps: Sequence[Step], operators: nn.ModuleDict) -> dict[str, Split]:
    """Slices that follow one another on an axis, by the name of the first."""
    groups: dict[tuple[str, int], list[tuple[str, Slice]]] = {}
    for step in steps:
        module = operators[step.name]
        if isinstance(module, Slice) and module.step == 1:
            groups.setdefault((step.inputs[0], module.axis), []).append((step.name, module))
    found = {}
    for (source, axis), slices in groups.items():
        bounds = (0, *(module.stop for _, module in slices))
        if len(slices) > 1 and bounds[:-1] == tuple(module.start for _, module in slices):
            names = tuple(name for name, _ in slices)
            found[names[0]] = Split(names, (source,), axis=axis, bounds=bounds)
    return found
