"""Layout moves that follow one another become the fewest that do the same."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from archnet.ops import Operator, Permute, Reshape, Step, Student

Move = Permute | Reshape
Axes = list[list[int]]  # of every axis the parts that it consists of, by number, outermost first


def shorten(student: Student) -> None:
    """Write chains of permutations and reshapes with the fewest of them, in place (exact).

    A rule of conversion moves a value into the order that its layers read, and back; what lies
    between two layers is then a permutation at most, with a reshape on either side where axes are
    parted or joined. Values of taps and of the result stay values of the student.
    """
    graph = student.graph
    shapes, by_name = graph.shapes, {step.name: step for step in graph.steps}
    moves = {
        step.name: module
        for step in graph.steps
        if isinstance(module := student.operator(step.name), Permute | Reshape)
    }
    kept = {*graph.outputs, *(tap.value for tap in graph.taps)}
    ends = kept | {name for step in graph.steps if step.name not in moves for name in step.inputs}
    steps: list[Step] = []
    added: dict[str, Operator] = {}
    made: dict[tuple[str, str], str] = {}  # by what a move reads, and the move
    instead: dict[str, str] = {}
    for step in graph.steps:
        if step.name not in moves:
            inputs = tuple(instead.get(name, name) for name in step.inputs)
            steps.append(replace(step, inputs=inputs))
        elif step.name in ends:
            source, chain = _shortest(step.name, by_name, moves, shapes, kept, ends)
            name = instead.get(source, source)
            for count, move in enumerate(chain, 1):
                key = name, f"{type(move).__name__} {move.spec()}"
                is_end = count == len(chain)
                if key not in made or (is_end and step.name in kept):
                    made[key] = step.name if is_end else f"{step.name}_move{count}"
                    added[made[key]] = move
                    steps.append(Step(made[key], (name,), step.origin))
                name = made[key]
            instead[step.name] = name
    if len(steps) < len(graph.steps) or added.keys() - moves.keys():
        student.rewire(steps, added=added, renamed=instead)


def _shortest(
    name: str,
    by_name: dict[str, Step],
    moves: dict[str, Move],
    shapes: dict[str, tuple[int, ...]],
    kept: set[str],
    ends: set[str],
) -> tuple[str, Sequence[Move]]:
    """The value that it costs least to move from, and how, so that it becomes the named one."""
    found: list[tuple[str, Sequence[Move]]] = []
    nearest: list[tuple[str, Sequence[Move]]] = []
    chain: list[Move] = []
    source = name
    while source in moves and (source == name or source not in kept):
        chain.insert(0, moves[source])
        (source,) = by_name[source].inputs
        if source in ends or source not in moves:
            nearest = nearest or [(source, list(chain))]
            found.append((source, fewest(shapes[source], chain)))
    if name in kept:
        # A tap is a value of its own, from which a block starts.
        found = [way for way in found if way[1]] or nearest
    return min(found, key=lambda way: _length(way[1]))


def _length(moves: Sequence[Move]) -> tuple[int, int]:
    """How many moves, and how many of them permute."""
    return len(moves), sum(isinstance(move, Permute) for move in moves)


def fewest(shape: tuple[int, ...], moves: Sequence[Move]) -> Sequence[Move]:
    """The fewest permutations and reshapes of a value of ``shape`` that do what some do in a row.

    The batch is axis 0 and not in ``shape``; it stays in front.
    """
    followed = _followed(shape, moves)
    if followed is None:
        return moves
    before, after, result, sizes = followed
    order = [part for axis in after for part in axis]
    if order == [part for axis in before for part in axis]:
        ways: list[list[Move]] = [[Reshape(result)] if result != shape else []]
    else:
        ways = [_in_three(before, order, result, sizes)]
        if (turn := _whole_axes(before, order)) is not None:
            ways.append(_turned_first(shape, turn, result))
        if (turn := _whole_axes(after, [part for axis in before for part in axis])) is not None:
            ways.append(_turned_last(turn, result))
    return min([list(moves), *ways], key=_length)


def _followed(
    shape: tuple[int, ...], moves: Sequence[Move]
) -> tuple[Axes, Axes, tuple[int, ...], dict[int, int]] | None:
    """The parts of a value's axes before and after some moves, its shape after them, and the sizes
    of parts; None where a reshape parts them in no whole numbers.
    """
    numbers = itertools.count()
    sizes = {next(numbers): size for size in shape}
    before: Axes = [[axis] if size > 1 else [] for axis, size in sizes.items()]
    after = [list(axis) for axis in before]
    for move in moves:
        if isinstance(move, Permute):
            after = [after[axis - 1] for axis in move.order[1:]]
            shape = tuple(shape[axis - 1] for axis in move.order[1:])
            continue
        rest, shape = [part for axis in after for part in axis], move.shape
        after = []
        for size in shape:
            axis, left = list[int](), size
            while left > 1:
                part = rest.pop(0)
                if sizes[part] > left and sizes[part] % left == 0:
                    inner = next(numbers)
                    sizes[inner], sizes[part] = sizes[part] // left, left
                    rest.insert(0, inner)
                    _insert_behind(before, part, inner)
                elif left % sizes[part]:
                    return None
                left //= sizes[part]
                axis.append(part)
            after.append(axis)
    return before, after, shape, sizes


def _insert_behind(axes: Axes, part: int, inner: int) -> None:
    """What is parted off at the end of a part follows it."""
    for axis in axes:
        if part in axis:
            axis.insert(axis.index(part) + 1, inner)


def _whole_axes(axes: Axes, order: Sequence[int]) -> list[int] | None:
    """In which order whole axes, by number, have their parts in ``order``, those of one entry
    first; None where other parts lie between those of one axis.
    """
    places = {part: place for place, part in enumerate(order)}
    for axis in axes:
        if any(places[b] != places[a] + 1 for a, b in itertools.pairwise(axis)):
            return None
    return sorted(range(len(axes)), key=lambda axis: places[axes[axis][0]] if axes[axis] else -1)


def _turned_first(
    shape: tuple[int, ...], turn: Sequence[int], result: tuple[int, ...]
) -> list[Move]:
    """A permutation of the axes that there are, and a reshape if that is not the result."""
    units = [axis for axis in turn if shape[axis] == 1]
    others = [axis for axis in turn if shape[axis] > 1]
    plain = [size for size in result if size > 1]
    if len(shape) == len(result) and [shape[axis] for axis in others] == plain:
        turn = [(units if size == 1 else others).pop(0) for size in result]
        return [_permutation(turn)]
    return [_permutation(turn), Reshape(result)]


def _turned_last(turn: Sequence[int], result: tuple[int, ...]) -> list[Move]:
    """A reshape to the axes of the result, and their permutation."""
    order = [turn.index(axis) for axis in range(len(turn))]
    return [Reshape(tuple(result[axis] for axis in turn)), _permutation(order)]


def _in_three(
    before: Axes, order: Sequence[int], result: tuple[int, ...], sizes: dict[int, int]
) -> list[Move]:
    """Parts that stay beside each other are one axis while they are moved."""
    places = {part: place for place, part in enumerate(order)}
    runs: list[list[int]] = []
    for part in (part for axis in before for part in axis):
        if runs and places[part] == places[runs[-1][-1]] + 1:
            runs[-1].append(part)
        else:
            runs.append([part])
    turn = _whole_axes(runs, order)
    assert turn is not None
    shape = tuple(math.prod(sizes[part] for part in run) for run in runs)
    return [Reshape(shape), _permutation(turn), Reshape(result)]


def _permutation(turn: Sequence[int]) -> Permute:
    """Axes in another order, counted without the batch."""
    return Permute((0, *(axis + 1 for axis in turn)))
