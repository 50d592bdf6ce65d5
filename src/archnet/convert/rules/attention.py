"""Multi-head self-attention, global, windowed or shifted (approximate)."""

import math

import torch
from torch import Tensor

from archnet.capture import Ref, TeacherGraph, TeacherNode
from archnet.convert.builder import Builder
from archnet.convert.feature import Feature, Value
from archnet.convert.fit import mixing, relative_error, ridge, rows
from archnet.convert.rules.base import (
    Alternative,
    Approximation,
    Site,
    constant,
    matrix_on,
    rule,
)
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


def _operands(node: TeacherNode, form: Approximation) -> list[str]:
    """What a product reads: of softmax weights and values, the values alone."""
    second = _second(node)
    return [second.name] if isinstance(second, Ref) else node.refs()


def _fused(node: TeacherNode, form: Approximation) -> list[str]:
    names = ["value"] if form.attention == "mixing" else ["query", "key", "value"]
    return [node.arguments[name].name for name in names]


@rule("aten.scaled_dot_product_attention.default", reads=_fused)
def attention(site: Site) -> Value:
    """softmax(Q K' / sqrt(d)) V, its weights independent of the input, and a context beside it.

    `mixing`: Y_h = A_h V_h with a fixed matrix over tokens for every head h; queries and keys, and
    the layers that only they need, leave the student.

    `context`: Y_h = P_h [A_h V_h; A_h max([Q_h; K_h], 0)]. What a token says of itself (its key
    names how much the others heed it) is rectified and mixed as the values are; the layers of
    queries and keys stay, and the fully connected layers across tokens cost what the products
    of attention cost. A and P are fitted one after the other by ridge regression.
    """
    value = site.feature("value")
    if site.approximation.attention == "mixing" or site.is_compact:
        return _mixed(site, value, [])
    return _mixed(site, value, [site.feature("query"), site.feature("key")])


@rule("aten.matmul.default", "aten.bmm.default", "aten.einsum.default", reads=_operands)
def product(site: Site) -> Value:
    """Softmax weights times values, as `attention` by `mixing`; or x W' for a constant W."""
    second, equation = _second(site.node), site.node.arguments.get("equation")
    if equation is not None and not _is_matmul(equation):
        raise site.error(f"einsum of '{equation}' has no rule; only matrix products have one")
    if isinstance(second, Ref):
        return _mixed(site, site.builder.build(site.referred(second)), [])
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


def _mixed(site: Site, value: Feature, context: list[Feature]) -> Value:
    """Fully connected layers across the tokens, (..., heads, tokens, channels), for every head.

    Axes in front of the heads (windows) share them.
    """
    builder, shape = site.builder, site.node.shape
    tokens, head_axis = len(shape) - 1, len(shape) - 2
    for feature in (value, *context):
        if len(shape) < 2 or feature.shape[:-2] != shape[:-2]:
            raise site.error(f"weighs features of shape {feature.shape} into {shape}")
    if any(feature.shape[-2] != value.shape[-2] for feature in context):
        context = []  # as many queries as keys, or none of both
    wanted, given = site.wanted(), site.given(value)
    sources = [value]
    if context:
        wide = [Feature(f.shape, first=builder.first(f), axis=len(shape)) for f in context]
        sources.append(builder.activation(builder.concat(wide), 0.0, math.inf))
    across = [_tokens_last(builder, source, tokens) for source in sources]
    heads = shape[-3] if len(shape) > 2 else 1
    parts, simpler = [], torch.zeros_like(wanted) if context else wanted
    for head in range(heads):
        v, y = given, wanted
        if heads > 1:
            v, y = v.select(-3, head), y.select(-3, head)
        matrix = mixing(v.reshape(-1, *v.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
        if context:
            place = simpler.select(-3, head) if heads > 1 else simpler
            place.copy_(matrix.float() @ v)
        mixed = []
        for source in across:
            part = source
            if heads > 1:
                part = builder.slice(source, head_axis, head, head + 1)
            done = builder.matrix_at_positions(part, matrix, _zeros(matrix))
            # The same value, its channels at the end of (..., tokens, channels).
            back = (*done.shape[:-2], done.shape[-1], done.shape[-2])
            mixed.append(Feature(back, last=builder.first(done), axis=tokens))
        parts.append(mixed[0] if not context else _projected(site, mixed, y))
    result = joined(site, parts, head_axis) if heads > 1 else parts[0]
    if context:
        site.alternative = Alternative(
            (site.argument("value").name,),
            relative_error(simpler, wanted),
            relative_error(site.given(result), wanted),
        )
    return result


def _projected(site: Site, mixed: list[Feature], wanted: Tensor) -> Feature:
    """P [values; context] at every token of one head, fitted around the values alone."""
    builder, last = site.builder, len(mixed[0].shape)
    both = builder.concat([Feature(f.shape, first=builder.first(f), axis=last) for f in mixed])
    x, width = rows(site.given(both), -1), mixed[0].shape[-1]
    prior = torch.eye(width, both.shape[-1], dtype=torch.float64)
    matrix = ridge(x, rows(wanted, -1), prior, 1e-3)
    return builder.matrix_at_positions(both, matrix, _zeros(matrix))


def _tokens_last(builder: Builder, feature: Feature, tokens: int) -> Feature:
    """(..., tokens, channels) as (..., channels, tokens), where a layer reads the tokens."""
    moved = builder.last(Feature(feature.shape, first=builder.first(feature), axis=tokens))
    return Feature(builder.graph.shapes[moved], first=moved, axis=len(feature.shape))


def _zeros(matrix: Tensor) -> Tensor:
    return torch.zeros(len(matrix), dtype=torch.float64)
