"""Attention written as products and a softmax is attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from archnet.capture import CARRIERS, Ref, TeacherGraph, TeacherNode, stem
from archnet.convert.rules.base import RULES, Approximation, at_elements

FUSED = "aten.scaled_dot_product_attention.default"
PRODUCT = "archnet.product.default"  # of two features, none of them weights

_TURNS = ("transpose", "swapaxes", "swapdims", "permute", "mT", "adjoint")
_LOWEST = -1e4  # of a mask: what a softmax makes zero of


@dataclass(frozen=True)
class _Scores:
    """scale * Q K' + bias; ``bias`` is for one sample, of the scores' shape.

    ``scale`` is (1,), or (heads,), as in a Swin V2, with heads in front of queries and keys.
    """

    query: Ref | Tensor
    key: Ref | Tensor
    scale: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    bias: Tensor | None = None

    def scaled(self, factor: Tensor) -> "_Scores":
        bias = None if self.bias is None else self.bias * factor[:, None, None]
        return replace(self, scale=self.scale * factor, bias=bias)

    def plus(self, bias: Tensor) -> "_Scores":
        return replace(self, bias=bias if self.bias is None else self.bias + bias)


def fuse(graph: TeacherGraph) -> TeacherGraph:
    """The graph with every softmax(c Q K' + B) V, B constant, as one node of attention.

    The node that multiplies by the values takes the place of all; what it no longer reads stays in
    the graph. What is written in another way stays as it is, and so does attention whose queries
    or keys no rule can convert: its fixed weights need neither.
    """
    by_name = {node.name: node for node in graph.nodes}
    nodes, convertible = list[TeacherNode](), set(graph.inputs)
    for node in with_products(graph).nodes:
        fused = _fused(by_name[node.name], by_name)
        if fused is None or not convertible.issuperset(fused.refs()):
            fused = node
        nodes.append(fused)
        rule = RULES.get(fused.operator)
        if rule is None or stem(node.operator) == "softmax":
            continue
        reads = fused.refs() if rule.reads is None else rule.reads(fused, Approximation())
        if convertible.issuperset(reads):
            convertible.add(node.name)
    return replace(graph, nodes=nodes)


def with_products(graph: TeacherGraph) -> TeacherGraph:
    """The graph with another operator for products of two features that weigh nothing."""
    weights = _softmax_weights(graph)

    def named(node: TeacherNode) -> TeacherNode:
        operands = _operands(node)
        if operands is None or operands[0].name in weights:
            return node
        return replace(node, operator=PRODUCT)

    return replace(graph, nodes=[named(node) for node in graph.nodes])


def _softmax_weights(graph: TeacherGraph) -> set[str]:
    """Names of values that are softmax weights as they come or in another shape."""
    found: set[str] = set()
    for node in graph.nodes:
        kind, refs = stem(node.operator), node.refs()
        if kind == "softmax" or (kind in (*CARRIERS, "expand") and refs and refs[0] in found):
            found.add(node.name)
    return found


def _fused(node: TeacherNode, by_name: Mapping[str, TeacherNode]) -> TeacherNode | None:
    pair = _factors(node)
    if pair is None:
        return None
    weights, value = pair
    if not isinstance(weights, Ref):
        return None
    source = by_name.get(weights.name)
    while source is not None and stem(source.operator) in CARRIERS:
        source = by_name.get(source.refs()[0])
    if source is None or stem(source.operator) != "softmax":
        return None
    if source.arguments["dim"] not in (-1, source.batch.rank - 1):
        return None
    scores = _scores(source.refs()[0], by_name)
    if scores is None:
        return None
    arguments = {
        "query": scores.query,
        "key": scores.key,
        "value": value,
        "attn_mask": None,
        "is_causal": False,
        "scale": scores.scale,
        "bias": scores.bias,
    }
    return replace(node, operator=FUSED, arguments=arguments)


def _scores(name: str, by_name: Mapping[str, TeacherNode]) -> _Scores | None:
    """What a softmax reads, as scores of queries and keys."""
    node = by_name.get(name)
    if node is None:
        return None
    kind, given = stem(node.operator), node.arguments
    if kind in CARRIERS:
        found = _scores(node.refs()[0], by_name)
        if found is None or found.bias is None:
            return found
        return replace(found, bias=found.bias.reshape(node.shape))
    if kind in ("add", "mul", "div") and isinstance(given["self"], Ref):
        found, other = _scores(given["self"].name, by_name), given["other"]
        if found is None or isinstance(other, Ref):
            return None
        if kind == "add":
            if not isinstance(other, Tensor):
                return found  # a softmax does not see it
            return found.plus(given["alpha"] * at_elements(node, other))
        factor = _by_head(node, other)
        if factor is None:
            return None
        return found.scaled(factor if kind == "mul" else 1 / factor)
    if kind == "masked_fill" and isinstance(given["mask"], Tensor):
        found = _scores(given["self"].name, by_name)
        if found is None or isinstance(given["value"], Ref | Tensor):
            return None
        lowest = max(float(given["value"]), _LOWEST)
        return found.plus(at_elements(node, given["mask"]) * lowest)
    pair = _factors(node)
    if pair is None:
        return None
    query, key = pair
    query, scale = _unscaled(query, by_name)
    if not isinstance(key, Ref):
        return _Scores(query, key.mT, scale)
    turned = by_name.get(key.name)
    if turned is None or not _turns_last(turned):
        return None
    key, factor = _unscaled(Ref(turned.refs()[0]), by_name)
    return _Scores(query, key, scale * factor)


def _unscaled(
    factor: Ref | Tensor, by_name: Mapping[str, TeacherNode]
) -> tuple[Ref | Tensor, Tensor]:
    """What is multiplied by one number before it is turned into scores, and that number: (1,)."""
    scale = torch.ones(1, dtype=torch.float64)
    while isinstance(factor, Ref) and (node := by_name.get(factor.name)) is not None:
        number = node.arguments.get("other")
        if stem(node.operator) not in ("mul", "div") or isinstance(number, Ref):
            break
        if not isinstance(node.arguments["self"], Ref):
            break
        value = torch.as_tensor(number, dtype=torch.float64)
        if value.numel() != 1:
            break
        scale = scale * (value if stem(node.operator) == "mul" else 1 / value).reshape(1)
        factor = node.arguments["self"]
    return factor, scale


def _by_head(node: TeacherNode, factor: Tensor | float) -> Tensor | None:
    """A constant factor of scores (..., heads, queries, keys) as (1,) or (heads,); None if it
    differs between windows, or between pairs of one head.
    """
    if not isinstance(factor, Tensor) or factor.numel() == 1:
        return torch.full((1,), float(factor), dtype=torch.float64)
    everywhere = at_elements(node, factor)
    if everywhere.dim() < 3:
        return None
    heads = everywhere.flatten(0, -4)[0, :, 0, 0] if everywhere.dim() > 3 else everywhere[:, 0, 0]
    return heads if bool((everywhere == heads[:, None, None]).all()) else None


def _operands(node: TeacherNode) -> tuple[Ref, Ref] | None:
    """The factors of a matrix product of two features."""
    pair = _factors(node)
    if pair is None or not isinstance(pair[0], Ref) or not isinstance(pair[1], Ref):
        return None
    return pair[0], pair[1]


def _factors(node: TeacherNode) -> tuple[Ref | Tensor, Ref | Tensor] | None:
    """The factors of a matrix product, of which one may be a constant."""
    if stem(node.operator) != "matmul":
        return None
    first, second = node.arguments.values()
    return first, second


def _turns_last(node: TeacherNode) -> bool:
    """Whether a node swaps the last two axes and nothing else."""
    kind, given, rank = stem(node.operator), node.arguments, node.batch.rank
    last = {rank - 2, rank - 1}
    if kind not in _TURNS:
        return False
    if kind in ("mT", "adjoint"):
        return True
    if kind == "permute":
        order = [dim % rank for dim in given["dims"]]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    dims = [value for name, value in given.items() if name not in ("self", "input")]
    return {dim % rank for dim in dims} == last
