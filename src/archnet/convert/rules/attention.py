"""Multi-head self-attention, global, windowed or shifted (approximate)."""

import math

import torch
from torch import Tensor

from archnet.capture import Ref, TeacherNode
from archnet.convert.feature import Feature, Value, resized
from archnet.convert.fit import attended, mixing, relative_error
from archnet.convert.rules.base import (
    Alternative,
    Approximation,
    Site,
    constant,
    joined,
    matrix_on,
    rule,
    spread_to,
)
from archnet.convert.rules.heads import (
    by_head,
    heads_of,
    in_order,
    layers,
    of_head,
    repeated,
    turned,
    unshifted,
)
from archnet.convert.rules.pairs import Pairs
from archnet.ops import MatMul, Softmax

# What a mask adds to scores of pairs that have no part: in hinges, and where a softmax reads them.
_LOWEST, _EXCLUDED = -16.0, -1e4


def _fused(node: TeacherNode, form: Approximation) -> list[str]:
    names = ["value"] if form.attention == "mixing" else ["query", "key", "value"]
    items = [node.arguments[name] for name in names]
    return [item.name for item in items if isinstance(item, Ref)]


@rule("aten.scaled_dot_product_attention.default", reads=_fused)
def attention(site: Site) -> Value:
    """softmax(Q K' / sqrt(d)) V, its weights independent of the input, and a context beside it.

    `mixing`: Y_h = A_h V_h with a fixed matrix over tokens for every head h; queries and keys, and
    the layers that only they need, leave the student.

    `context`: two rectified layers stand for attention's two products (`fit.attended`): one joins a
    token's key with its value before both are mixed over tokens, one a token's query with what
    the mixing brought to it. What a token receives then depends on what it asks for.

    Learned queries, or keys and values, are the same for all inputs, and become values of the
    student that are.

    A target that multiplies features and has a softmax keeps attention (exact); one with a constant
    mask, or a bias for every pair, if it has an addition as well.
    """
    site.require_batch_ahead(2)
    if site.node.arguments.get("dropout_p"):
        raise site.error("drops weights in eval mode too: pass dropout_p=0.0 in eval mode")
    form = site.approximation.attention
    if form != "mixing" and site.builder.keeps("matmul", "softmax"):
        kept = _kept(site)
        if kept is not None:
            return kept
    if form == "mixing" or site.is_compact:
        return mixed(site, site.feature("value"))
    features = [site.feature(name) for name in ("query", "key", "value")]
    if features[1].shape[-2] != features[2].shape[-2]:
        raise site.error("has different numbers of keys and values: give one value for each key")
    if form == "pairs" and site.builder.target.fc_per_position:
        return _in_pairs(site, *features)
    return _in_context(site, *features)


def _kept(site: Site) -> Feature | None:
    """Two products, a constant between them where there is one, and a softmax; None where heads
    are shared, a mask depends on the input, or the target does not add.
    """
    given, builder = site.node.arguments, site.builder
    if site.is_compact or isinstance(given.get("attn_mask"), Ref):
        return None
    query, key, value = (site.feature(name) for name in ("query", "key", "value"))
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not alike or key.shape[-2] != value.shape[-2]:
        return None
    scale = given.get("scale")
    scale = torch.as_tensor(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if scale.numel() > 1 and (len(query.shape) < 3 or scale.numel() != query.shape[-3]):
        return None
    mask = _mask(site, query.shape[-3] if len(query.shape) > 2 else 1, _EXCLUDED)
    if mask is not None and not builder.keeps("add"):
        return None
    factor = scale.flatten().tolist() if scale.numel() > 1 else float(scale)
    scores = MatMul(transposed=True, factor=factor)
    name = builder.emit("scores", scores, builder.first(query), builder.first(key))
    if mask is not None:
        shape = builder.graph.shapes[name]
        windows = math.prod(shape) // mask[0].numel()
        everywhere = mask.expand(windows, *mask.shape[1:]).reshape(shape)
        axis = len(shape)
        name = builder.first(
            builder.add_constant(Feature(shape, first=name, axis=axis), everywhere)
        )
    name = builder.emit("weights", Softmax(), name)
    name = builder.emit("mixed", MatMul(), name, builder.first(value))
    return Feature(site.node.shape, first=name, axis=len(site.node.shape))


def _names(item: Ref | Tensor) -> tuple[str, ...]:
    return (item.name,) if isinstance(item, Ref) else ()


def _values(node: TeacherNode, form: Approximation) -> list[str]:
    """What a product of softmax weights and values reads: the values alone."""
    return [node.refs()[-1]]


@rule("aten.matmul.default", reads=_values)
def product(site: Site) -> Value:
    """Softmax weights times values, as `attention` by `mixing`; or x W or W x for a constant W."""
    (first, left), (second, right) = site.node.arguments.items()
    if isinstance(left, Ref) and isinstance(right, Ref):
        return mixed(site, site.builder.build(site.value(second)))
    on_right, matrix = isinstance(left, Ref), constant(right if isinstance(left, Ref) else left)
    name, axis = (first, site.axis(-1)) if on_right else (second, site.axis(-2))
    value, batch, shape = site.tagged(name, axis), site.node.batch, site.node.shape
    # One matrix (out, in) for every position ahead, as one sample has them.
    matrix = matrix.mT if on_right else matrix
    matrix = matrix[(None,) * (batch.rank - matrix.dim())]
    if batch.axis < batch.rank - 2 and batch.folded == 1:
        if matrix.shape[batch.axis] != 1:
            raise site.error("has a matrix for every sample of a batch: share one")
        matrix = matrix.squeeze(batch.axis)
    out = batch.student_axis(-1 if on_right else -2)
    value = spread_to(site, value, resized(shape, out, matrix.shape[-1]))
    return _by_position(site, site.builder.tagged(value, out), matrix, 1)


def _by_position(site: Site, value: Value, matrix: Tensor, axis: int) -> Value:
    """A matrix for every entry of the axes from ``axis`` on, of (..., out, in)."""
    if matrix.dim() == 2:
        return matrix_on(site, value, matrix, torch.zeros(len(matrix), dtype=torch.float64))
    if bool((matrix == matrix[:1]).all()):
        return _by_position(site, value, matrix[0], axis + 1)
    feature = site.builder.build(value)
    parts = [
        _by_position(site, site.builder.slice(feature, axis, at, at + 1), part, axis + 1)
        for at, part in enumerate(matrix)
    ]
    return joined(site, [site.builder.build(part) for part in parts], axis)


def mixed(site: Site, value: Feature) -> Value:
    """Fully connected layers across the tokens, (..., heads, tokens, channels), one for every head.

    Axes in front of the heads (windows) share them.
    """
    heads = heads_of(site, value)
    wanted, given = site.wanted(), site.given(value)
    matrices = [
        mixing(of_head(given, head, heads), of_head(wanted, head, heads)) for head in range(heads)
    ]
    done = layers(site.builder, by_head(site, value), unshifted(matrices))
    return in_order(site, done, (0, 3, 1, 2, 4))


def _in_context(site: Site, query: Feature, key: Feature, value: Feature) -> Value:
    """The layers of `fit.attended`, those of all heads side by side."""
    builder, heads = site.builder, heads_of(site, query, key, value)
    wanted, simpler = site.wanted(), torch.empty_like(site.wanted())
    given = [*(site.given(feature) for feature in (query, key, value)), wanted]
    fits = []
    for head in range(heads):
        fitted = attended(*(of_head(x, head, heads) for x in given))
        of_head(simpler, head, heads).copy_(fitted.mixed(of_head(given[2], head, heads)))
        fits.append(fitted)
    query, key, value = (by_head(site, feature) for feature in (query, key, value))
    if key.shape[0] != value.shape[0]:
        key, value = (repeated(site, feature, heads) for feature in (key, value))
    offers = turned(builder, builder.concat([key, value]), (0, 1, 4, 2, 3), 2)
    offered = layers(builder, offers, [fitted.offer for fitted in fits], rectified=True)
    offered = turned(builder, offered, (0, 1, 3, 4, 2), 4)
    # One matrix mixes the values of a head and what they offer: they are features of one layer.
    mixable = builder.concat([repeated(site, value, heads), offered])
    received = layers(builder, mixable, unshifted([fitted.weights for fitted in fits]))
    received = builder.concat([received, repeated(site, query, heads)])
    received = turned(builder, received, (0, 1, 4, 2, 3), 2)
    answered = layers(builder, received, [fitted.answer for fitted in fits], rectified=True)
    both = builder.concat([received, answered])
    done = layers(builder, both, [fitted.result for fitted in fits])
    result = in_order(site, done, (0, 4, 1, 3, 2))
    site.alternative = Alternative(
        _names(site.argument("value")),
        relative_error(simpler, wanted),
        relative_error(site.given(result), wanted),
    )
    return result


def _in_pairs(site: Site, query: Feature, key: Feature, value: Feature) -> Value:
    """Hinges for every pair of tokens."""
    given, wanted = site.node.arguments, site.wanted()
    scale, heads = given.get("scale"), heads_of(site, query, key, value)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scales = torch.as_tensor(scale, dtype=torch.float64).expand(heads)
    pairs = Pairs(site, (query, key, value), heads, _mask(site, heads, _LOWEST), scales.tolist())
    result = pairs.build()
    site.alternative = Alternative(
        _names(site.argument("value")),
        relative_error(pairs.simpler, pairs.split_heads(wanted)),
        relative_error(site.given(result), wanted),
    )
    return result


def _mask(site: Site, heads: int, lowest: float) -> Tensor | None:
    """What is added to scores for all inputs, ``lowest`` or more: (windows or 1, heads, queries,
    keys).
    """
    given = site.node.arguments
    size = (site.node.shape[-2], site.feature("key").shape[-2])
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        mask = torch.ones(size, dtype=torch.bool).tril()
    if isinstance(mask, Ref):
        raise site.error("has a mask that depends on the input: take convert.attention=context")
    if mask is None:
        mask = given.get("bias")
    elif mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    if mask is None:
        return None
    while mask.dim() > 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.dim() < 3:
        mask = mask.expand(1, *size)
    mask = mask.detach().double().cpu().clamp_min(lowest)
    return mask.reshape(-1, *mask.shape[-3:]).expand(-1, heads, *size)
