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
        operators: their names without overload, or, where there is a dot, with it.
        advice: why there is no rule, and what to change in the network.
        relative: an operator whose rule is a model for one that is missing; "" if there is none.
        kind: what descriptions of targets call these operators; "" if none does.
    """

    operators: tuple[str, ...]
    advice: str
    relative: str = ""
    kind: str = ""


_BEHIND = "end the network before it, and compute it from the student's result"

_REDUCTIONS = ("max", "min", "amin", "mean", "sum", "amax", "norm")

FAMILIES: Sequence[Family] = (
    Family(
        (
            *("topk", "sort", "argsort", "msort", "kthvalue", "median", "nanmedian", "mode"),
            *("argmax", "argmin", "unique", "unique_consecutive", "searchsorted", "bucketize"),
            *("nms", "batched_nms", "quantile", "aminmax", "histc", "bincount"),
        ),
        f"layers cannot sort or select entries by their values: {_BEHIND}",
        "aten.amax.default",
    ),
    Family(
        ("lstm", "lstm_cell", "_thnn_fused_lstm_cell"),
        "a student has no recurrent layers: convert the network before it or after it, and run "
        "the recurrence outside the student",
        kind="lstm",
    ),
    Family(
        (
            *("gru", "gru_cell", "rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell"),
            *("_thnn_fused_gru_cell", "scan", "associative_scan", "while_loop"),
        ),
        "a student has no recurrent layers: convert the network before it or after it, and run "
        "the recurrence outside the student",
        kind="gru",
    ),
    Family(
        ("cumsum",),
        "write a running sum over the last axis, of n entries, as a product with a constant: "
        "x @ torch.ones(n, n).triu()",
        "aten.matmul.default",
    ),
    Family(
        ("cumprod", "cummax", "cummin", "logcumsumexp", "diff", "prod"),
        f"each entry depends on those before it, which no rule approximates: {_BEHIND}, or write "
        "it with slices, products of two factors or maximum",
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
        "which entries it reads or writes depends on values, and layers read fixed positions: "
        f"{_BEHIND}; write constant positions as slices or as an index by one constant",
        "aten.index.Tensor",
        "gather",
    ),
    Family(
        ("embedding", "embedding_bag"),
        "it looks up rows by integers, and a student's inputs are floats: start the network after "
        "it, with the rows as input, or feed one-hot vectors and write one_hot @ weight",
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
        "layers are continuous functions and a comparison is not: write it with relu, clamp, "
        f"maximum or a sigmoid, or {_BEHIND}",
        "aten.maximum.default",
    ),
    Family(
        ("eq", "equal"),
        "layers are continuous functions and a comparison is not: write it with relu, clamp, "
        f"maximum or a sigmoid, or {_BEHIND}",
        "aten.maximum.default",
        "equal",
    ),
    Family(
        (
            *("floor", "ceil", "round", "trunc", "fix", "frac", "remainder", "fmod"),
            *("floor_divide", "div.Tensor_mode", "div.Scalar_mode", "divide.Tensor_mode"),
            *("true_divide.Tensor_mode",),
        ),
        f"layers are continuous functions and rounding is not: leave it out, or {_BEHIND}",
        "aten.threshold.default",
    ),
    Family(
        (
            *("conv3d", "conv_transpose3d", "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"),
            *("adaptive_max_pool3d", "max_pool3d_with_indices", "upsample_nearest3d"),
            *("upsample_trilinear3d", "slow_conv3d", "fractional_max_pool3d"),
        ),
        "a student's maps have two spatial axes: make frames samples or channels of a 2-D layer, "
        "such as a (1, k, k) kernel on each frame",
        "aten.conv2d.default",
    ),
    Family(
        (
            *("stft", "istft", "view_as_complex", "view_as_real", "complex", "polar", "real"),
            *("imag", "angle", "conj", "_conj", "resolve_conj"),
        ),
        "a student has no complex numbers: write a Fourier transform of fixed size as two products "
        "with constants, x @ cosines and x @ sines",
        "aten.matmul.default",
    ),
    Family(
        (
            *("rand", "randn", "rand_like", "randn_like", "randint_like", "bernoulli", "normal"),
            *("uniform", "multinomial", "poisson", "exponential", "random", "randperm"),
            *("native_dropout", "gumbel_softmax", "randint", "cauchy"),
        ),
        "it draws random numbers, which a student cannot: skip it in eval mode (if "
        "self.training: ...)",
        "aten.dropout.default",
    ),
    Family(
        (
            *("cross_entropy_loss", "nll_loss", "nll_loss2d", "mse_loss", "l1_loss", "kl_div"),
            *("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss"),
            *("smooth_l1_loss", "ctc_loss", "triplet_margin_loss", "cosine_embedding_loss"),
        ),
        "a loss is not deployed: return the scores from forward",
    ),
    Family(
        (
            *("quantize_per_tensor", "quantize_per_channel", "dequantize", "fake_quantize"),
            *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine"),
            *("fused_moving_avg_obs_fake_quant", "int_repr", "_fake_quantize_learnable_per_tensor"),
            *("_fake_quantize_learnable_per_channel", "quantize_per_tensor_dynamic"),
        ),
        "archnet quantizes the student itself: convert the floating-point network",
    ),
    Family(
        ("max_unpool2d", "max_unpool3d", "max_unpool1d", "max_pool2d_with_indices"),
        "it uses the indices of maxima, which layers cannot return: pool without return_indices, "
        "and upsample with nn.Upsample or nn.ConvTranspose2d",
        "aten.upsample_nearest2d.vec",
    ),
    Family(
        (
            *("hardshrink", "tanhshrink", "logit", "softsign", "logaddexp"),
            *("logaddexp2", "xlogy", "special_xlog1py"),
        ),
        "no rule converts this activation: write it with operators that have a rule (relu, clamp, "
        "softshrink, tanh, sigmoid, exp, log, products), or use another activation",
        "aten.softshrink.default",
    ),
    Family(
        ("pow.Tensor_Tensor", "pow.Scalar", "float_power", "exp2", "atan2", "hypot", "ldexp"),
        "it is a function of two features: write it with exp and log, such as "
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
        "no rule approximates this function: write it with exp, log, sqrt, sin, cos, tanh, erf or "
        "products, which have rules",
        "aten.sqrt.default",
    ),
    Family(
        ("logsumexp", "std_mean", "var_mean", "cosine_similarity", "pairwise_distance", "cdist"),
        "its parts have rules and it has none: write it with exp, sum, log, mean, products and "
        "norms, such as x.exp().sum(dim).log()",
        "aten.linalg_vector_norm.default",
    ),
    Family(
        ("std", "var"),
        "its rule needs axes of at least two entries: give dim, without the batch",
        "aten.mean.dim",
    ),
    Family(
        _REDUCTIONS,
        "its rule works within a sample: give dim, without the batch",
        "aten.amax.default",
    ),
    Family(
        ("einsum", "tensordot", "bilinear", "outer", "ger", "kron", "dot", "vdot", "chain_matmul"),
        "its rule takes two factors with one summed axis: write it with permute, @ and sum",
        "aten.matmul.default",
        "matmul",
    ),
    Family(
        ("cross", "det", "logdet", "inverse", "cholesky", "qr", "svd", "trace", "matrix_exp"),
        f"layers cannot compute it: {_BEHIND}, or compute it from weights alone",
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
        f"it turns a tensor into a Python number: {_BEHIND}",
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
        return "give it axes within a sample, such as x.amax((1, 2, 3), keepdim=True) for x.max()"
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
        f" ({', '.join(runs)} {'run' if len(runs) > 1 else 'runs'} {family.kind}, but a student "
        f"cannot hold it{outside}: run it beside the student)"
        if runs
        else ""
    )
    near = relative(operator)
    like = f" (compare the rule of {near})" if near else ""
    # The first is enough to start with, and all of them tell how far the teacher is.
    more = f"; also without a rule: {', '.join(others)}" if others else ""
    return (
        f"no rule for {operator} {missing[operator][0].place}: {family.advice}{kept}. To extend "
        f'archnet, add a rule with @rule("{operator}") in '
        f"src/archnet/convert/rules/{_name(operator)}.py{like}; CONTRIBUTING.md has the steps{more}"
    )
