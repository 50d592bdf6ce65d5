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
    a gate, which are no scores.
    """
    by_name = {node.name: node for node in graph.nodes}
    batches = graph.batches()
    head: list[TeacherNode] = []
    moves: list[TeacherNode] = []
    output, node = graph.output, by_name.get(graph.output)
    while node is not None:
        read = by_name.get(_read(node, by_name))
        if read is None:
            break  # The network's input is no score.
        if _is_decision(node, by_name, batches[read.name].axis, batches[read.name].rank):
            head += [*moves, *_decision(node, by_name)]
            moves, output = [], read.name
        elif _is_monotonic(node, by_name, batches[node.name].axis):
            head.append(node)
            if moves:
                moves[-1] = _reading(moves[-1], node.name, read.name)
                by_name[moves[-1].name] = moves[-1]
            else:
                output = read.name
        elif stem(node.operator) in _MOVES:
            moves.append(node)
        else:
            break
        node = read
    peeled = {node.name for node in head}
    nodes = [by_name[node.name] for node in graph.nodes if node.name not in peeled]
    return replace(graph, nodes=nodes, output=output, head=head[::-1])


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
