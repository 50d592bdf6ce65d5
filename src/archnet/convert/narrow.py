"""Rows of a matrix whose results are thrown away are not computed."""

import math
from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from archnet.ops import FullyConnected, Operator, Permute, Reshape, Slice, Step, Student


def narrow(student: Student) -> None:
    """Take the rows that nobody reads out of fully connected layers, in place (exact).

    A teacher computes queries, keys and values in one layer and splits its result by layout moves;
    where only the values are left, two thirds of that layer would be computed for nothing. Looked
    for are layers whose one reader is a slice, with permutations and reshapes between.
    """
    graph = student.graph
    added: dict[str, Operator] = {}
    instead: dict[str, str] = {}  # of every slice that goes, what its readers read
    readers, by_name = student.consumers(), {step.name: step for step in graph.steps}
    kept = {*graph.outputs, *(tap.value for tap in student.taps)}
    for cut in [step for step in graph.steps if isinstance(student.operator(step.name), Slice)]:
        chain = _chain(student, cut, readers, by_name, kept)
        smaller = chain and _narrowed(student, *chain, cut)
        if chain and smaller:
            layer, moves = chain
            added.update(smaller)
            instead[cut.name] = (moves[-1] if moves else layer).name
    if instead:
        steps = [
            Step(s.name, tuple(instead.get(name, name) for name in s.inputs), s.origin)
            for s in graph.steps
            if s.name not in instead
        ]
        student.rewire(steps, added=added, renamed=instead)


def _chain(
    student: Student,
    cut: Step,
    readers: Mapping[str, Sequence[Step]],
    by_name: Mapping[str, Step],
    kept: Set[str],
) -> tuple[Step, list[Step]] | None:
    """The layer in front of a slice and the moves between them; None where there is none."""
    moves: list[Step] = []
    current = cut
    while True:
        source = by_name.get(current.inputs[0])
        if source is None or source.name in kept or len(readers[source.name]) != 1:
            return None
        module = student.operator(source.name)
        if isinstance(module, FullyConnected):
            return source, moves[::-1]
        if not isinstance(module, Permute | Reshape):
            return None
        moves.append(source)
        current = source


def _narrowed(
    student: Student, layer: Step, moves: Sequence[Step], cut: Step
) -> dict[str, Operator] | None:
    """The layer without the rows that do not arrive, and the moves that then give the slice.

    The number of every element is followed through the moves: it tells which rows arrive.
    """
    shape, slicing = student.graph.shapes[layer.name], student.operator(cut.name)
    assert isinstance(slicing, Slice)
    numbers = torch.arange(math.prod(shape)).reshape(1, *shape)
    wanted = numbers
    for step in (*moves, cut):
        wanted = student.operator(step.name)(wanted)
    rows = (wanted % shape[-1]).unique()
    if len(rows) == shape[-1] or wanted.numel() != math.prod(shape[:-1]) * len(rows):
        return None  # every row arrives somewhere
    size = student.graph.shapes[cut.inputs[0]][slicing.axis - 1]
    width = wanted.shape[slicing.axis]
    fitting = _moves(student, moves, numbers[..., rows], wanted, size, width)
    if fitting is None:
        return None
    module = student.operator(layer.name)
    assert isinstance(module, FullyConnected)
    smaller = FullyConnected(module.in_features, len(rows), module.trainable)
    with torch.no_grad():
        smaller.weight.copy_(module.weight[rows])
        smaller.bias.copy_(module.bias[rows])
    return {layer.name: smaller, **{s.name: m for s, m in zip(moves, fitting, strict=True)}}


def _moves(
    student: Student,
    moves: Sequence[Step],
    numbers: Tensor,
    wanted: Tensor,
    size: int,
    width: int,
) -> list[Permute | Reshape] | None:
    """The same moves on fewer rows: in every new shape one axis of ``size`` has ``width``.

    Which one it is where several have that size is found by trying.
    """
    trials: list[tuple[Tensor, list[Permute | Reshape]]] = [(numbers, [])]
    for step in moves:
        module = student.operator(step.name)
        found = []
        for value, before in trials:
            options: list[Permute | Reshape] = []
            if isinstance(module, Reshape):
                for axis, extent in enumerate(module.shape):
                    shape = (*module.shape[:axis], width, *module.shape[axis + 1 :])
                    if extent == size and math.prod(shape) == value.numel():
                        options.append(Reshape(shape))
            else:
                assert isinstance(module, Permute)
                options = [module]
            found += [(option(value), [*before, option]) for option in options]
        trials = found
    for value, made in trials:
        if value.shape == wanted.shape and torch.equal(value, wanted):
            return made
    return None
