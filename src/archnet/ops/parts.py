"""Consecutive slices that cut an axis into parts: one Split for a runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from archnet.ops.graph import Step
from archnet.ops.layout import Slice


@dataclass(frozen=True)
class Parting:
    """Slices of ``source`` along ``axis``, each from where the one before it ends, from 0 on.

    ``bounds`` are where they begin, and where the last one ends; the batch is axis 0.
    """

    source: str
    axis: int
    cuts: Mapping[str, Slice]
    bounds: tuple[int, ...]


def partings(steps: Sequence[Step], operators: nn.ModuleDict) -> list[Parting]:
    """All of two slices and more, in order."""
    groups: dict[tuple[str, int], dict[str, Slice]] = {}
    for step in steps:
        module = operators[step.name]
        if isinstance(module, Slice) and module.step == 1:
            groups.setdefault((step.inputs[0], module.axis), {})[step.name] = module
    found = []
    for (source, axis), cuts in groups.items():
        bounds = (0, *(cut.stop for cut in cuts.values()))
        if len(cuts) > 1 and bounds[:-1] == tuple(cut.start for cut in cuts.values()):
            found.append(Parting(source, axis, cuts, bounds))
    return found
