"""What `torch.export` gave, in operators that rules know, before it is read."""

import operator
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten


def simplify(program: ExportedProgram) -> None:
    """Rewrite a captured program in place; it computes what it computed before."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            _inline(program, node)
    for node in list(program.graph.nodes):
        if node.target is aten.glu.default:
            _open_gate(node)
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

    def put(target: Any, *args: Any) -> Node:
        made = node.graph.call_function(target, args)
        made.meta = {**node.meta, "val": target(*torch.fx.node.map_arg(args, _value))}
        return made

    with node.graph.inserting_before(node):
        halves = put(aten.chunk.default, node.args[0], 2, *(node.args[1:] or (-1,)))
        ours, theirs = (put(operator.getitem, halves, index) for index in range(2))
        node.replace_all_uses_with(put(aten.mul.Tensor, ours, put(aten.sigmoid.default, theirs)))
    node.graph.erase_node(node)


def _value(node: Node) -> Any:
    return node.meta["val"]
