"""What `torch.export` gave, in operators that rules know, before it is read."""

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from archnet.capture.functional import functionalize
from archnet.capture.nodes import named_arguments, stem

aten = torch.ops.aten
# What keeps weights weights, and scores scores.
CARRIERS = ("dropout", "contiguous", "clone", "detach", "alias", "view", "reshape")
_ON_SCORES = (*CARRIERS, "add", "mul", "div", "masked_fill")


def simplify(program: ExportedProgram) -> None:
    """Rewrite a captured program in place; it computes what it computed before.

    Raises:
        CaptureError: it writes to a tensor in a way that cannot be written otherwise.
    """
    for node in list(program.graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            _inline(program, node)
    functionalize(program)
    for node in list(program.graph.nodes):
        if node.target in _ON_MAPS:
            _on_map(node)
        elif rewrite := _REWRITES.get(node.target):
            rewrite(node)
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


def _on_map(node: Node) -> None:
    """An operator on rows (C, L) as the one on maps (C, 1, L) that it is."""
    given = named_arguments(node)
    for name, value in given.items():
        if name == "weight":
            with node.graph.inserting_before(node):
                given[name] = _put(node, aten.unsqueeze.default, value, 2)
        elif isinstance(value, list | tuple) and value:
            given[name] = [0 if "padding" in name else 1, *value]
    with node.graph.inserting_before(node):
        read, *others = given.values()
        one = _put(node, aten.unsqueeze.default, read, -2)
        made = _put(node, _ON_MAPS[node.target], one, *others)
        _replace(node, made, lambda result: _put(node, aten.squeeze.dim, result, -2))


def _replace(
    node: Node, made: Node, finish: Callable[[Node], Node] = lambda result: result
) -> None:
    """Let ``made``, or each of its results, take the place of ``node``, after ``finish``."""
    if isinstance(made.meta["val"], Tensor):
        node.replace_all_uses_with(finish(made))
    else:
        for user in list(node.users):
            user.replace_all_uses_with(finish(_put(node, operator.getitem, made, user.args[1])))
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _least(node: Node) -> None:
    """min(x) = -max(-x)."""
    largest = aten.max.dim if node.target is aten.min.dim else aten.amax.default
    with node.graph.inserting_before(node):
        made = _put(node, largest, _put(node, aten.neg.default, node.args[0]), *node.args[1:])

        def turned(result: Node) -> Node:
            is_place = not result.meta["val"].is_floating_point()
            return result if is_place else _put(node, aten.neg.default, result)

        _replace(node, made, turned)


def _spread(node: Node) -> None:
    """Variance and deviation as they are defined: the mean square of what is left of the mean."""
    given, x = named_arguments(node), node.args[0]
    dims, last = given["dim"], given["keepdim"]
    if not dims:
        return  # over the samples as well
    correction = given["unbiased"] if "unbiased" in given else given["correction"]
    sizes = [x.meta["val"].shape[dim] for dim in dims]  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in sizes):
        return
    count = math.prod(sizes)
    left = count - (1 if correction is None else correction)
    if left <= 0:
        return  # of one value there is none
    with node.graph.inserting_before(node):
        mean = _put(node, aten.mean.dim, x, dims, True)
        squares = _put(node, aten.pow.Tensor_Scalar, _put(node, aten.sub.Tensor, x, mean), 2)
        made = _put(node, aten.mean.dim, squares, dims, last)
        made = _put(node, aten.mul.Tensor, made, count / left)
        if stem(node.target) == "std":
            made = _put(node, aten.sqrt.default, made)
        _replace(node, made)


def _sum_of_products(node: Node) -> None:
    """An einsum of two factors that contracts one axis, as a product of matrices.

    Letters of both factors and of the result count matrices; each factor has one more letter, but
    for a factor of several beside a plain matrix.
    """
    factors = cast(list[Node], node.args[1])
    terms = _letters(cast(str, node.args[0]), [factor.meta["val"].dim() for factor in factors])
    if terms is None or any(len(set(term)) < len(term) for term in terms):
        return
    ours, theirs, result = terms
    if len(ours) == 2 < len(theirs):
        ours, theirs, factors = theirs, ours, factors[::-1]
    common = [letter for letter in ours if letter in theirs]
    inner = [letter for letter in common if letter not in result]
    shared = "".join(letter for letter in common if letter in result)
    outer = ["".join(x for x in term if x not in common) for term in (ours, theirs)]
    if len(inner) != 1 or len(outer[1]) != 1 or (shared and len(outer[0]) != 1):
        return
    if set(result) != set(shared + "".join(outer)):
        return  # It sums over an axis of one factor as well.
    orders = [shared + outer[0] + inner[0], shared + inner[0] + outer[1]]
    with node.graph.inserting_before(node):
        turned = [
            _permuted(node, factor, term, order)
            for factor, term, order in zip(factors, (ours, theirs), orders, strict=True)
        ]
        made = _put(node, aten.matmul.default, *turned)
        _replace(node, _permuted(node, made, shared + "".join(outer), result))
    _product(made)


def _letters(equation: str, ranks: list[int]) -> list[str] | None:
    """The terms of an einsum of two factors, with letters for dots; None of another."""
    sides = equation.replace(" ", "").split("->")
    terms = [*sides[0].split(","), *sides[1:]]
    dots = {rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=False)}
    if len(ranks) != 2 or len(terms) != 3 or ("..." in equation and len(dots) > 1):
        return None
    return [term.replace("...", "0123456789"[: max(dots)]) for term in terms]


def _permuted(place: Node, value: Node, letters: str, order: str) -> Node:
    """A value with axes of these letters, in another order of them."""
    if letters == order:
        return value
    return _put(place, aten.permute.default, value, [letters.index(x) for x in order])


def _sum_with_product(node: Node) -> None:
    """addmm: alpha A B + beta C."""
    addend, first, second, beta, alpha = named_arguments(node).values()
    with node.graph.inserting_before(node):
        product = _put(node, aten.matmul.default, first, second)
        made, addend = (
            value if factor == 1 else _put(node, aten.mul.Tensor, value, factor)
            for value, factor in ((product, alpha), (addend, beta))
        )
        _replace(node, _put(node, aten.add.Tensor, made, addend))
    _product(product)


def _ratio(node: Node) -> None:
    """A ratio as a product with a reciprocal: each of the two has a fit."""
    x, s = node.args
    if isinstance(s, Node):
        with node.graph.inserting_before(node):
            inverse = _put(node, aten.reciprocal.default, s)
            _replace(node, _put(node, aten.mul.Tensor, x, inverse))


def _open_gate(node: Node) -> None:
    """A gated linear unit as its parts: glu(x) = a sigmoid(b), with a and b the halves of x.

    So that every part has a value of the teacher's that a rule can be fitted to.
    """
    with node.graph.inserting_before(node):
        halves = _put(node, aten.chunk.default, node.args[0], 2, *(node.args[1:] or (-1,)))
        ours, theirs = (_put(node, operator.getitem, halves, index) for index in range(2))
        gate = _put(node, aten.sigmoid.default, theirs)
        _replace(node, _put(node, aten.mul.Tensor, ours, gate))


def _product(node: Node) -> None:
    """A product with a vector as one with a matrix; attention on channels first as on tokens first.

    V W' = (W V')' for weights W of a softmax, and for scores Q' K = Q' (K')': then weights stand in
    front of values, and the second factor of scores is a transpose, as rules know it.
    """
    node.target = aten.matmul.default
    first, second = node.args
    assert isinstance(first, Node)
    assert isinstance(second, Node)
    with node.graph.inserting_before(node):
        if first.meta["val"].dim() == 1:
            row = _put(node, aten.unsqueeze.default, first, 0)
            made = _put(node, node.target, row, second)
            _replace(node, made, lambda result: _put(node, aten.squeeze.dim, result, -2))
        elif second.meta["val"].dim() == 1:
            column = _put(node, aten.unsqueeze.default, second, 1)
            made = _put(node, node.target, first, column)
            _replace(node, made, lambda result: _put(node, aten.squeeze.dim, result, -1))
        elif _is_turn(second) and _are_weights(second.args[0]):
            values = _put(node, aten.transpose.int, first, -2, -1)
            made = _put(node, node.target, second.args[0], values)
            _replace(node, made, lambda result: _put(node, aten.transpose.int, result, -2, -1))
        elif not _is_turn(second) and _are_scores(node):
            keys = _put(node, aten.transpose.int, second, -2, -1)
            node.args = (first, _put(node, aten.transpose.int, keys, -2, -1))


def _is_turn(node: Any) -> bool:
    """Whether a node exchanges the last two axes."""
    kind = stem(node.target)
    if kind in ("mT", "adjoint"):
        return True
    rank = node.meta["val"].dim()
    if kind == "permute":
        order = [dim % rank for dim in cast(list[int], node.args[1])]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    dims = {dim % rank for dim in node.args[1:] if isinstance(dim, int)}
    return kind in ("transpose", "swapaxes", "swapdims") and dims == {rank - 2, rank - 1}


def _are_weights(node: Any) -> bool:
    while stem(node.target) in CARRIERS:
        node = node.args[0]
    return stem(node.target) == "softmax"


def _are_scores(node: Node) -> bool:
    """Whether a softmax reads a product, scaled and masked."""
    return any(
        stem(user.target) == "softmax" or (stem(user.target) in _ON_SCORES and _are_scores(user))
        for user in node.users
    )


def _put(place: Node, target: Any, *args: Any) -> Node:
    """A new operator, taken to be of the module whose operator it stands for."""
    made = place.graph.call_function(target, args)
    result = target(*torch.fx.node.map_arg(args, lambda read: read.meta["val"]))
    made.meta = {**place.meta, "val": result}
    return made


_ON_MAPS: dict[Any, Any] = {
    aten.conv1d.default: aten.conv2d.default,
    aten.conv1d.padding: aten.conv2d.padding,
    aten.conv_transpose1d.default: aten.conv_transpose2d.input,
    aten.max_pool1d.default: aten.max_pool2d.default,
    aten.avg_pool1d.default: aten.avg_pool2d.default,
    aten.adaptive_max_pool1d.default: aten.adaptive_max_pool2d.default,
    aten.adaptive_avg_pool1d.default: aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest1d.vec: aten.upsample_nearest2d.vec,
    aten.upsample_linear1d.vec: aten.upsample_bilinear2d.vec,
}
_REWRITES: dict[Any, Callable[[Node], None]] = {
    aten.glu.default: _open_gate,
    aten.div.Tensor: _ratio,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    aten.mm.default: _product,
    aten.einsum.default: _sum_of_products,
    aten.mv.default: _product,
    aten.addmm.default: _sum_with_product,
    aten.baddbmm.default: _sum_with_product,
    aten.addmv.default: _sum_with_product,
    aten.amin.default: _least,
    aten.min.dim: _least,
    **dict.fromkeys(
        (aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction), _spread
    ),
}
