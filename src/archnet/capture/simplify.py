"""What `torch.export` gave, in operators that rules know, before it is read."""

import operator
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
# What keeps weights weights, and scores scores.
_CARRIERS = ("dropout", "contiguous", "clone", "detach", "view", "reshape")
_ON_SCORES = (*_CARRIERS, "add", "mul", "div", "masked_fill")


def simplify(program: ExportedProgram) -> None:
    """Rewrite a captured program in place; it computes what it computed before."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            _inline(program, node)
    for node in list(program.graph.nodes):
        if node.target is aten.glu.default:
            _open_gate(node)
        if node.target in _PRODUCTS:
            _turn(node)
    program.graph_module.recompile()


def _inline(program: ExportedProgram, node: Node) -> None:
    """Put the operators of a part under `autocast(enabled=False)` in its place.

    A teacher runs in its own precision here, so that this is no context at all. One that asks for
    another precision is left alone.
    """
    part, given = node.args[4], cast(list[Node], node.args[5:])
    assert isinstance(part, Node)
    body = getattr(program.graph_module, str(part.target)).graph
    if node.args[2] or any(inner.op == "get_attr" for inner in body.nodes):
        return
    reads = (inner for inner in body.nodes if inner.op == "placeholder")
    with node.graph.inserting_before(node):
        results: Any = node.graph.graph_copy(body, dict(zip(reads, given, strict=True)))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _open_gate(node: Node) -> None:
    """A gated linear unit as its parts: glu(x) = a sigmoid(b), with a and b the halves of x.

    So that every part has a value of the teacher's that a rule can be fitted to.
    """
    with node.graph.inserting_before(node):
        halves = _put(node, aten.chunk.default, node.args[0], 2, *(node.args[1:] or (-1,)))
        ours, theirs = (_put(node, operator.getitem, halves, index) for index in range(2))
        gate = _put(node, aten.sigmoid.default, theirs)
        node.replace_all_uses_with(_put(node, aten.mul.Tensor, ours, gate))
    node.graph.erase_node(node)


def _turn(node: Node) -> None:
    """Attention on channels first, as attention on tokens first.

    V W' = (W V')' for weights W of a softmax, and for scores Q' K = Q' (K')': then weights stand in
    front of values, and the second factor of scores is a transpose, as rules know it.
    """
    first, second = node.args
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    with node.graph.inserting_before(node):
        if _is_turn(second) and _are_weights(second.args[0]):
            values = _put(node, aten.transpose.int, first, -2, -1)
            product = _put(node, node.target, second.args[0], values)
            node.replace_all_uses_with(_put(node, aten.transpose.int, product, -2, -1))
            node.graph.erase_node(node)
        elif second.meta["val"].dim() > 1 and not _is_turn(second) and _are_scores(node):
            keys = _put(node, aten.transpose.int, second, -2, -1)
            node.args = (first, _put(node, aten.transpose.int, keys, -2, -1))


def _is_turn(node: Any) -> bool:
    """Whether a node exchanges the last two axes."""
    if _stem(node) not in ("transpose", "swapaxes", "swapdims"):
        return _stem(node) in ("mT", "adjoint")
    rank = node.meta["val"].dim()
    return {int(dim) % rank for dim in node.args[1:]} == {rank - 2, rank - 1}


def _are_weights(node: Any) -> bool:
    while _stem(node) in _CARRIERS:
        node = node.args[0]
    return _stem(node) == "softmax"


def _are_scores(node: Node) -> bool:
    """Whether a softmax reads a product, scaled and masked."""
    return any(
        _stem(user) == "softmax" or (_stem(user) in _ON_SCORES and _are_scores(user))
        for user in node.users
    )


def _stem(node: Any) -> str:
    target = getattr(node, "target", None)
    return str(target).removeprefix("aten.").split(".")[0].strip("_")


def _put(place: Node, target: Any, *args: Any) -> Node:
    """A new operator, taken to be of the module whose operator it stands for."""
    made = place.graph.call_function(target, args)
    result = target(*torch.fx.node.map_arg(args, lambda read: read.meta["val"]))
    made.meta = {**place.meta, "val": result}
    return made
