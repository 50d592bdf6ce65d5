"""Where teacher and student are compared: block outputs, found in the graph.

A *cut* is a node after which nothing else is alive: all that follows depends on it alone. A
*block* is the smallest module that holds at least two weighted layers and whose output is a cut
(a residual block, an inception module, a dense block) and no product of two features (a gate of
squeeze-and-excitation); no class name is looked at. Taps stand at the outputs and inputs of blocks;
a long chain without blocks (VGG) is cut at its activations.
"""

import difflib
import math
from collections.abc import Sequence

from torch import Tensor

from archnet.capture import TeacherGraph, TeacherNode, stem
from archnet.convert.builder import ConversionError

ACTIVATIONS = {
    "relu",
    "relu6",
    "hardtanh",
    "clamp",
    "clamp_min",
    "leaky_relu",
    "elu",
    "gelu",
    "silu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
}
LONGEST_BLOCK = 4  # weighted layers in a chain before it is cut at activations


def choose_taps(
    graph: TeacherGraph, paths: Sequence[str] | None = None
) -> list[tuple[str, TeacherNode]]:
    """Pairs (module path, node) in forward order.

    Args:
        paths: module paths to tap; chosen from the graph when absent.

    Raises:
        ConversionError: a path names no module of the teacher.
    """
    if paths is not None:
        chosen = sorted((_output_of(graph, path), path) for path in paths)
        return [(path, graph.nodes[index]) for index, path in chosen]
    nodes, cuts = graph.nodes, _cuts(graph)
    found: dict[int, str] = {}
    for path, first, last in _blocks(graph, cuts):
        inner = [
            i for i in range(first, last) if i in cuts and stem(nodes[i].operator) in ACTIVATIONS
        ]
        if sum(map(_is_weighted, nodes[first : last + 1])) > LONGEST_BLOCK and inner:
            found.update((i, nodes[i].path) for i in inner)
        found[last] = path
        if first - 1 in cuts:
            found.setdefault(first - 1, nodes[first - 1].path)
    if not found:
        found = {i: nodes[i].path for i in cuts if stem(nodes[i].operator) in ACTIVATIONS}
    taps, previous = [], -1
    for index in sorted(found):
        node = nodes[index]
        # Class scores have a loss of their own, and a stretch without weights learns nothing.
        if not node.batch.plain or len(node.shape) < 2:
            continue
        if any(map(_is_weighted, nodes[previous + 1 : index + 1])):
            taps.append((found[index], node))
            previous = index
    return taps


def _cuts(graph: TeacherGraph) -> set[int]:
    """Indices of nodes after which no other value is read."""
    last_read: dict[str, float] = dict.fromkeys(graph.outputs, math.inf)
    for index, node in enumerate(graph.nodes):
        for name in node.refs():
            last_read[name] = max(last_read.get(name, -1), index)
    cuts, alive_until = set(), -1.0
    for name in graph.inputs:
        alive_until = max(alive_until, last_read.get(name, -1))
    for index, node in enumerate(graph.nodes):
        if alive_until <= index and last_read.get(node.name, -1) > index:
            cuts.add(index)
        alive_until = max(alive_until, last_read.get(node.name, -1))
    return cuts


def _blocks(graph: TeacherGraph, cuts: set[int]) -> list[tuple[str, int, int]]:
    """(path, first node, last node) of the smallest modules that are blocks."""
    spans: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        parts = node.path.split(".") if node.path else []
        for depth in range(1, len(parts) + 1):
            spans.setdefault(".".join(parts[:depth]), []).append(index)
    blocks = {
        path: indices
        for path, indices in spans.items()
        if indices[-1] in cuts
        and sum(_is_weighted(graph.nodes[i]) for i in indices) >= 2
        and not _is_gate(graph.nodes[indices[-1]])
    }
    return [
        (path, indices[0], indices[-1])
        for path, indices in blocks.items()
        if not any(other.startswith(path + ".") for other in blocks)
    ]


def _output_of(graph: TeacherGraph, path: str) -> int:
    inside = [
        index
        for index, node in enumerate(graph.nodes)
        if node.path == path or node.path.startswith(path + ".")
    ]
    if not inside:
        known = sorted({node.path for node in graph.nodes})
        near = difflib.get_close_matches(path, known, 1, 0.0)
        raise ConversionError(
            f"convert.taps names '{path}', which is no module that the teacher runs"
            + (f"; nearest: '{near[0]}'" if near else "")
        )
    return inside[-1]


def _is_weighted(node: TeacherNode) -> bool:
    return isinstance(node.arguments.get("weight"), Tensor) and "norm" not in node.operator


def _is_gate(node: TeacherNode) -> bool:
    """Whether a node is a product of two features."""
    return stem(node.operator) == "mul" and len(node.refs()) > 1
