"""The head of a classifier: what turns scores into probabilities or into a decision.

    scores -> softmax, log-softmax or sigmoid -> argmax -> result

None of them changes which class is the largest, and no target needs them: they are *peeled*. The
graph ends with the scores, and what stood behind them is done where the result is read. Moves
behind a softmax stay; behind an argmax there is nothing left to move. A temperature stands in front
of the softmax and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from archnet.capture.simplify import CARRIERS, stem

if TYPE_CHECKING:
    from archnet.capture.graph import TeacherGraph, TeacherNode

_ALONG = ("softmax", "log_softmax", "special_softmax", "special_log_softmax")
_EACH = ("sigmoid", "log_sigmoid", "special_expit")
_MOVES = (*CARRIERS, "flatten", "unflatten", "squeeze", "unsqueeze", "to", "_to_copy", "to_copy")


def peel(graph: TeacherGraph) -> TeacherGraph:
    """The graph up to its scores; ``head`` has the nodes that were behind them, in order.

    A softmax or an argmax is peeled where it is the last that the network does and goes along an
    axis of each sample; a sigmoid where a sample's result is a vector. On maps it makes pixels or
    a gate, which are no scores. What is read elsewhere as well stays, and results that are the
    same once their heads are gone (scores and probabilities) are one.
    """
    before, graph = list[str](), _once(graph)
    while before != graph.outputs:
        before = graph.outputs
        for output in before:
            graph = _peeled(graph, output)
        graph = _once(graph)
    return graph


def _peeled(graph: TeacherGraph, result: str) -> TeacherGraph:
    """The same with the head of one result peeled."""
    by_name = {node.name: node for node in graph.nodes}
    batches, readers = graph.batches(), _readers(graph)
    head: list[TeacherNode] = []
    moves: list[TeacherNode] = []
    output, node, passed = result, by_name.get(result), set[str]()
    axis: int | None = None
    while node is not None:
        read, ends = by_name.get(_read(node, by_name)), _decision(node, by_name)
        if read is None:
            break  # The network's input is no score.
        passed.update(end.name for end in ends)
        is_result = node.name != result and node.name in graph.outputs
        if is_result or any(not readers.get(end.name, passed) <= passed for end in ends):
            break
        batch = batches[read.name]
        if _is_decision(node, by_name, batch.axis, batch.rank):
            head += [*moves, *ends]
            moves, output, axis = [], read.name, ends[-1].arguments["dim"] % batch.rank
        elif _is_monotonic(node, by_name, batches[node.name].axis):
            head.append(node)
            if moves:
                moves[-1] = _reading(moves[-1], node.name, read.name)
                by_name[moves[-1].name] = moves[-1]
            else:
                output = read.name
                axis = node.arguments["dim"] % batch.rank if "dim" in node.arguments else axis
        elif stem(node.operator) in _MOVES:
            moves.append(node)
        else:
            break
        node = read
    peeled, place = {node.name for node in head}, graph.outputs.index(result)
    outputs, classes = list(graph.outputs), list(graph.classes)
    outputs[place] = output
    if axis is not None and batches[output].plain:
        classes[place] = axis
    nodes = [by_name[node.name] for node in graph.nodes if node.name not in peeled]
    return replace(
        graph, nodes=nodes, outputs=outputs, classes=classes, head=[*head[::-1], *graph.head]
    )


def _readers(graph: TeacherGraph) -> dict[str, set[str]]:
    """For every value the nodes that read it, of those that a result depends on."""
    wanted, readers = set(graph.outputs), dict[str, set[str]]()
    for node in reversed(graph.nodes):
        if node.name in wanted:
            wanted.update(node.refs())
            for name in node.refs():
                readers.setdefault(name, set()).add(node.name)
    return readers


def _once(graph: TeacherGraph) -> TeacherGraph:
    """Every result once: of those that are one value the first, with the classes that any told."""
    kept: dict[str, int] = {}
    classes = list(graph.classes)
    for index, name in enumerate(graph.outputs):
        first = kept.setdefault(name, index)
        classes[first] = classes[index] if classes[first] is None else classes[first]
    return replace(
        graph,
        outputs=[*kept],
        names=[graph.names[index] for index in kept.values()],
        classes=[classes[index] for index in kept.values()],
    )


def _read(node: TeacherNode, by_name: Mapping[str, TeacherNode]) -> str:
    """The one value that a node of a head reads; of a maximum's place, that of the maximum."""
    names = node.refs()
    source = by_name.get(names[0]) if len(names) == 1 else None
    if source is not None and "getitem" in node.operator:
        return source.refs()[0]
    return names[0] if len(names) == 1 else ""


def _decision(node: TeacherNode, by_name: Mapping[str, TeacherNode]) -> list[TeacherNode]:
    return [node, by_name[node.refs()[0]]] if "getitem" in node.operator else [node]


def _is_decision(
    node: TeacherNode, by_name: Mapping[str, TeacherNode], batch: int, rank: int
) -> bool:
    """Whether a node is the place of the largest value of every sample along one axis."""
    last = _decision(node, by_name)[-1]
    if node is last:
        is_place = stem(node.operator) == "argmax"
    else:
        is_place = stem(last.operator) == "max" and node.arguments["1"] == 1
    dim = last.arguments.get("dim")
    return is_place and dim is not None and 0 <= batch != dim % rank


def _is_monotonic(node: TeacherNode, by_name: Mapping[str, TeacherNode], batch: int) -> bool:
    kind = stem(node.operator)
    if kind in _EACH:
        return len(node.shape) <= 1
    if kind == "log":
        before = by_name.get(node.refs()[0])
        return before is not None and _is_monotonic(before, by_name, batch)
    return kind in _ALONG and 0 <= batch != node.arguments["dim"] % node.batch.rank


def _reading(node: TeacherNode, old: str, new: str) -> TeacherNode:
    """A node that reads another value."""

    def turned(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return type(argument)(map(turned, argument))
        return replace(argument, name=new) if getattr(argument, "name", None) == old else argument

    return replace(node, arguments={key: turned(x) for key, x in node.arguments.items()})
