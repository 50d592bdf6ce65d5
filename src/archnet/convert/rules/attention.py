"""Multi-head self-attention, global, windowed or shifted (approximate)."""

import torch

from archnet.capture import Ref, TeacherGraph, TeacherNode
from archnet.convert.feature import Feature, Value
from archnet.convert.fit import mixing
from archnet.convert.rules.base import Site, constant, matrix_on, rule
from archnet.convert.rules.layout import joined

# What may stand between a softmax and the product that it weighs.
_CARRIERS = ("dropout", "contiguous", "clone", "view", "reshape", "expand", "detach")


def softmax_weights(graph: TeacherGraph) -> set[str]:
    """Names of values that are softmax weights as they come or in another shape."""
    found: set[str] = set()
    for node in graph.nodes:
        stem = node.operator.removeprefix("aten.").split(".")[0].strip("_")
        refs = node.refs()
        if stem == "softmax" or (stem in _CARRIERS and refs and refs[0] in found):
            found.add(node.name)
    return found


def _second(node: TeacherNode) -> object:
    """The second operand of a product."""
    if "tensors" in node.arguments:
        return node.arguments["tensors"][-1]
    return node.arguments.get("other", node.arguments.get("mat2"))


def _value_of(node: TeacherNode) -> list[str]:
    """What a product reads: of softmax weights and values, the values alone."""
    second = _second(node)
    return [second.name] if isinstance(second, Ref) else node.refs()


@rule(
    "aten.scaled_dot_product_attention.default",
    reads=lambda node: [node.arguments["value"].name],
)
def attention(site: Site) -> Value:
    """softmax(Q K' / sqrt(d)) V: weights that depend on the input give way to fixed ones.

    See `_mixed`. Queries and keys, and the layers that only they need, leave the student.
    """
    return _mixed(site, site.feature("value"))


@rule("aten.matmul.default", "aten.bmm.default", "aten.einsum.default", reads=_value_of)
def product(site: Site) -> Value:
    """Softmax weights times values, as `attention`; or x W' for a constant W, which is linear."""
    second, equation = _second(site.node), site.node.arguments.get("equation")
    if equation is not None and not _is_matmul(equation):
        raise site.error(f"einsum of '{equation}' has no rule; only matrix products have one")
    if isinstance(second, Ref):
        return _mixed(site, site.builder.build(site.referred(second)))
    matrix = constant(second)  # type: ignore[arg-type]
    name = "tensors" if "tensors" in site.node.arguments else "self"
    if name == "tensors" or matrix.dim() != 2:
        raise site.error("multiplies by a constant of other than two axes; this has no rule")
    bias = torch.zeros(matrix.shape[1], dtype=torch.float64)
    return matrix_on(site, site.tagged("self", len(site.node.shape)), matrix.T, bias)


def _is_matmul(equation: str) -> bool:
    """Whether an einsum is '...ij,...jk->...ik'."""
    sides = equation.replace(" ", "").split("->")
    operands = sides[0].split(",")
    if len(sides) != 2 or len(operands) != 2:
        return False
    left, right = operands
    same = left[:-2] == right[:-2] and left[-1] == right[-2]
    return same and sides[1] == left[:-1] + right[-1]


def _mixed(site: Site, value: Feature) -> Value:
    """Y = A_h V for every head h: a fully connected layer across the tokens.

    A_h is fitted to what the teacher's attention gave, by ridge regression (`fit.mixing`). Axes in
    front of the heads (windows) share it: (..., heads, tokens, channels).
    """
    builder, shape = site.builder, site.node.shape
    if len(shape) < 2 or value.shape[:-2] != shape[:-2] or value.shape[-1] != shape[-1]:
        raise site.error(f"weighs values of shape {value.shape} into {shape}; this has no rule")
    tokens, head_axis = len(shape) - 1, len(shape) - 2
    wanted, given = site.wanted(), site.given(value)
    heads = shape[-3] if len(shape) > 2 else 1
    # Tokens last, where a fully connected layer reads them.
    swapped = builder.last(Feature(value.shape, first=builder.first(value), axis=tokens))
    across = Feature(builder.graph.shapes[swapped], first=swapped, axis=len(shape))
    parts = []
    for head in range(heads):
        part, v, y = across, given, wanted
        if heads > 1:
            part = builder.slice(across, head_axis, head, head + 1)
            v, y = v.select(-3, head), y.select(-3, head)
        matrix = mixing(v.reshape(-1, *v.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
        bias = torch.zeros(len(matrix), dtype=torch.float64)
        parts.append(builder.matrix_at_positions(part, matrix, bias))
    mixed = joined(site, parts, head_axis) if heads > 1 else parts[0]
    return Feature(shape, last=builder.first(mixed), axis=tokens)
