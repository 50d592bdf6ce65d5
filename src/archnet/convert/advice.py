"""What a user can do about an operator that no rule converts, by family of operators."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from archnet.capture import TeacherNode, stem
from archnet.convert.rules import RULES
from archnet.hardware import Target


@dataclass(frozen=True)
class Family:
    """Operators that fail for one reason.

    Attributes:
        operators: their names without overload; or, with a dot, with it.
        advice: why there is no rule, and what to change in the network.
        relative: an operator with a rule that somebody who writes one would compare; "" if none is
            of use.
        kind: what descriptions of targets call these operators; "" if none does.
    """

    operators: tuple[str, ...]
    advice: str
    relative: str = ""
    kind: str = ""


_BEHIND = "end the network in front of it, and do it on the student's result"

_REDUCTIONS = ("max", "min", "amin", "mean", "sum", "amax", "norm")

FAMILIES: Sequence[Family] = (
    Family(
        (
            *("topk", "sort", "argsort", "msort", "kthvalue", "median", "nanmedian", "mode"),
            *("argmax", "argmin", "unique", "unique_consecutive", "searchsorted", "bucketize"),
            *("nms", "batched_nms", "quantile", "aminmax", "histc", "bincount"),
        ),
        f"it orders or picks entries by their values, which layers do not: {_BEHIND}",
        "aten.amax.default",
    ),
    Family(
        ("lstm", "lstm_cell", "_thnn_fused_lstm_cell"),
        "a recurrence has no form in layers: keep it outside, and convert the network in front of "
        "it or behind it",
        kind="lstm",
    ),
    Family(
        (
            *("gru", "gru_cell", "rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell"),
            *("_thnn_fused_gru_cell", "scan", "associative_scan", "while_loop"),
        ),
        "a recurrence has no form in layers: keep it outside, and convert the network in front of "
        "it or behind it",
        kind="gru",
    ),
    Family(
        ("cumsum",),
        "a running sum along the last axis of n entries is a product with a constant, and that has "
        "a rule: write x @ torch.ones(n, n).triu()",
        "aten.matmul.default",
    ),
    Family(
        ("cumprod", "cummax", "cummin", "logcumsumexp", "diff", "prod"),
        f"every entry needs those before it, which no form is fitted for: {_BEHIND}, or write it "
        "with slices, products of two or maximum",
        "aten.amax.default",
    ),
    Family(
        (
            *("gather", "take", "take_along_dim", "index_put", "index_add", "index_copy"),
            *("index_fill", "scatter", "scatter_add", "scatter_reduce", "select_scatter"),
            *("slice_scatter", "diagonal_scatter", "masked_select", "masked_scatter", "nonzero"),
            *("put", "repeat_interleave", "one_hot", "argwhere", "roi_align", "roi_pool"),
            *("ps_roi_align", "deform_conv2d", "grid_sampler", "grid_sampler_2d", "affine_grid"),
        ),
        "which entries it reads or writes depends on values, and a student's layers read fixed "
        f"places: {_BEHIND}; places that are constants are slices or an index by one constant",
        "aten.index.Tensor",
        "gather",
    ),
    Family(
        ("embedding", "embedding_bag"),
        "it looks rows up by integers, which are no feature: let the network begin behind it, with "
        "the rows as its input, or feed one-hot vectors and write one_hot @ weight",
        "aten.linear.default",
        "gather",
    ),
    Family(
        (
            *("gt", "ge", "lt", "le", "ne", "greater", "greater_equal", "less", "less_equal"),
            *("not_equal", "logical_and", "logical_or", "logical_not", "logical_xor"),
            *("bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "isnan", "isinf"),
            *("isfinite", "isclose", "any", "all", "heaviside", "sign", "sgn", "signbit"),
            *("nan_to_num", "is_nonzero", "__and__", "__or__"),
        ),
        "a comparison jumps, and sums of layers do not: write it with relu, clamp, maximum or a "
        f"sigmoid, or {_BEHIND}",
        "aten.maximum.default",
    ),
    Family(
        ("eq", "equal"),
        "a comparison jumps, and sums of layers do not: write it with relu, clamp, maximum or a "
        f"sigmoid, or {_BEHIND}",
        "aten.maximum.default",
        "equal",
    ),
    Family(
        (
            *("floor", "ceil", "round", "trunc", "fix", "frac", "remainder", "fmod"),
            *("floor_divide", "div.Tensor_mode", "div.Scalar_mode", "divide.Tensor_mode"),
            *("true_divide.Tensor_mode",),
        ),
        f"rounding jumps, and sums of layers do not: leave it out, or {_BEHIND}",
        "aten.threshold.default",
    ),
    Family(
        (
            *("conv3d", "conv_transpose3d", "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"),
            *("adaptive_max_pool3d", "max_pool3d_with_indices", "upsample_nearest3d"),
            *("upsample_trilinear3d", "slow_conv3d", "fractional_max_pool3d"),
        ),
        "a student's maps have two axes beside channels: take frames as samples or as channels of "
        "a 2-D layer, such as a (1, k, k) kernel on every frame",
        "aten.conv2d.default",
    ),
    Family(
        (
            *("stft", "istft", "view_as_complex", "view_as_real", "complex", "polar", "real"),
            *("imag", "angle", "conj", "_conj", "resolve_conj"),
        ),
        "a student has no complex numbers: a Fourier transform of fixed size is two products with "
        "constants, so write x @ cosines and x @ sines",
        "aten.matmul.default",
    ),
    Family(
        (
            *("rand", "randn", "rand_like", "randn_like", "randint_like", "bernoulli", "normal"),
            *("uniform", "multinomial", "poisson", "exponential", "random", "randperm"),
            *("native_dropout", "gumbel_softmax", "randint", "cauchy"),
        ),
        "it draws random numbers, and a student has none: leave it out in eval mode (if "
        "self.training: ...)",
        "aten.dropout.default",
    ),
    Family(
        (
            *("cross_entropy_loss", "nll_loss", "nll_loss2d", "mse_loss", "l1_loss", "kl_div"),
            *("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss"),
            *("smooth_l1_loss", "ctc_loss", "triplet_margin_loss", "cosine_embedding_loss"),
        ),
        "a loss is no part of what is deployed: let forward return the scores",
    ),
    Family(
        (
            *("quantize_per_tensor", "quantize_per_channel", "dequantize", "fake_quantize"),
            *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
            *("fused_moving_avg_obs_fake_quant", "int_repr", "_fake_quantize_learnable_per_tensor"),
            *("_fake_quantize_learnable_per_channel", "quantize_per_tensor_dynamic"),
        ),
        "archnet quantizes itself: convert the network as it was in floating point",
    ),
    Family(
        ("max_unpool2d", "max_unpool3d", "max_unpool1d", "max_pool2d_with_indices"),
        "places of extremes are no feature: pool without return_indices, and enlarge with "
        "nn.Upsample or nn.ConvTranspose2d",
        "aten.upsample_nearest2d.vec",
    ),
    Family(
        (
            *("hardshrink", "tanhshrink", "logit", "softsign", "logaddexp"),
            *("logaddexp2", "xlogy", "special_xlog1py"),
        ),
        "this activation has no form yet: write it with operators that have one (relu, clamp, "
        "softshrink, tanh, sigmoid, exp, log, products), or take another",
        "aten.softshrink.default",
    ),
    Family(
        ("pow.Tensor_Tensor", "pow.Scalar", "float_power", "exp2", "atan2", "hypot", "ldexp"),
        "it is a function of two values or of an exponent: write it with exp and log, such as "
        "(y * x.log()).exp() for x ** y",
        "aten.pow.Tensor_Scalar",
        "pow",
    ),
    Family(
        (
            *("tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "log2"),
            *("log10", "erfc", "erfinv", "lgamma", "digamma", "sinc", "deg2rad", "rad2deg"),
            *("special_expit", "i0", "igamma", "softmin"),
        ),
        "no form is fitted to this function yet: write it with exp, log, sqrt, sin, cos, tanh, erf "
        "or products, which have one",
        "aten.sqrt.default",
    ),
    Family(
        ("logsumexp", "std_mean", "var_mean", "cosine_similarity", "pairwise_distance", "cdist"),
        "it has no rule as one operator, and its parts have: write exp, sum, log, mean, products "
        "and norms out, such as x.exp().sum(dim).log()",
        "aten.linalg_vector_norm.default",
    ),
    Family(
        ("std", "var"),
        "it has a rule over fixed axes of at least two entries: give dim, and not the batch",
        "aten.mean.dim",
    ),
    Family(
        _REDUCTIONS,
        "it has a rule over axes of a sample: give dim, and not the batch",
        "aten.amax.default",
    ),
    Family(
        ("einsum", "tensordot", "bilinear", "outer", "ger", "kron", "dot", "vdot", "chain_matmul"),
        "only two factors that share one summed axis have a rule: write it with permute, @ and sum",
        "aten.matmul.default",
        "matmul",
    ),
    Family(
        ("cross", "det", "logdet", "inverse", "cholesky", "qr", "svd", "trace", "matrix_exp"),
        f"linear algebra has no form in layers: {_BEHIND}, or compute it from weights alone",
    ),
    Family(
        ("tril", "triu", "diag", "diagonal", "diag_embed", "diagflat"),
        "multiply by a constant mask instead, such as x * torch.ones(n, n).tril()",
        "aten.mul.Tensor",
    ),
    Family(
        (
            *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
            *("reflection_pad3d", "replication_pad3d", "_pad_circular", "pad_sequence"),
        ),
        "pad with nn.functional.pad or nn.ZeroPad2d on maps of two axes",
        "aten.pad.default",
    ),
    Family(
        (
            *("fractional_max_pool2d", "lp_pool2d", "lp_pool1d", "upsample_area", "_upsample"),
            *("upsample_bilinear2d_aa", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
            *("upsample_nearest_exact2d", "_upsample_nearest_exact2d", "_upsample_nearest_exact1d"),
        ),
        "change sizes with max- or average-pooling, or nn.Upsample with mode nearest, bilinear or "
        "bicubic and antialias=False",
        "aten.upsample_bilinear2d.vec",
    ),
    Family(
        ("_foreach", "item", "_local_scalar_dense", "sym_size", "tolist", "cond", "map"),
        f"it takes a number out of the network: {_BEHIND}",
    ),
)
_PREFIXES: Mapping[str, str] = {
    "fft_": "stft",
    "linalg_": "det",
    "special_": "tan",
    "nll": "nll_loss",
}
_OTHER = Family(
    (),
    "write it with operators that have a rule (archnet.convert.rules.RULES lists them), or "
    f"{_BEHIND}",
)


def _name(operator: str) -> str:
    """An operator's name without its library and overload: ``torchvision.nms.default``, nms."""
    parts = operator.split(".")
    return parts[1] if len(parts) == 3 else stem(operator)


def family_of(operator: str) -> Family:
    """The family of an operator by its full name, ``aten.topk.default``."""
    name, overload = _name(operator), operator.rsplit(".", maxsplit=1)[-1]
    short = name.strip("_")
    for wanted in (f"{name}.{overload}", name, short):
        for family in FAMILIES:
            if wanted in family.operators:
                return family
    for prefix, member in _PREFIXES.items():
        if short.startswith(prefix):
            return family_of(f"aten.{member}.default")
    return _OTHER


def way_apart(operator: str) -> str:
    """What to do where an operator mixes the samples of a batch."""
    name = stem(operator)
    if name in ("matmul", "softmax", "log_softmax", "scaled_dot_product_attention"):
        return "put the batch first (permute, or batch_first=True of nn.MultiheadAttention)"
    if name in (*_REDUCTIONS, "linalg_vector_norm", "std", "var", "prod", "all", "any"):
        return "give it the axes of a sample, such as x.amax((1, 2, 3), keepdim=True) for x.max()"
    return "keep the batch an axis of its own"


def relative(operator: str) -> str:
    """An operator whose rule is near to one that is missing: of the same name, or its family's."""
    family = family_of(operator)
    same = [other for other in RULES if _name(other) == _name(operator)]
    return family.relative or (same[0] if same else "")


def no_rule(missing: Mapping[str, Sequence[TeacherNode]]) -> str:
    """The line about operators without a rule: what to change for the first, and the others.

    Args:
        missing: the nodes of every such operator, in forward order.
    """
    operator, *others = missing
    family = family_of(operator)
    runs = family.kind and [
        name for name in Target.names() if family.kind in Target.named(name).operators
    ]
    # Translation students alone have products of activations.
    outside = " outside translation" if family.kind in ("matmul", "softmax") else ""
    kept = (
        f" ({', '.join(runs)} {'run' if len(runs) > 1 else 'runs'} {family.kind}, but conversion "
        f"does not keep it{outside}: there it can stand beside the student)"
        if runs
        else ""
    )
    near = relative(operator)
    like = f", compare the rule of {near}" if near else ""
    # The first is enough to start with, and all of them tell how far the teacher is.
    more = f"; no rule either for {', '.join(others)}" if others else ""
    return (
        f"no rule for {operator} {missing[operator][0].place}: {family.advice}{kept}. Who extends "
        f'archnet adds one with @rule("{operator}") in '
        f"src/archnet/convert/rules/{_name(operator)}.py, listed in rules/__init__.py{like}{more}"
    )
