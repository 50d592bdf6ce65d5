"""One function per operator: how it stands in an ONNX file.

The quantizers on an operator decide how it stands there, and the writer how rounding is written.
In forms qdq and subbyte the tensors between operators hold the integers themselves, and every
operator, layout moves included, works on floats between a DequantizeLinear and a QuantizeLinear. A
runtime fuses the three into one integer kernel. In form qonnx a tensor holds the values of its
integers. Attributes are written out: some tools know no defaults.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from archnet.deploy.writer import ExportError, Grid, Value, Writer
from archnet.ops import (
    Activation,
    Add,
    AddConstant,
    AveragePool,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    Function,
    LayerNorm,
    MatMul,
    MaxPool,
    Mean,
    Multiply,
    Operator,
    Pad,
    Permute,
    Reshape,
    Slice,
    Softmax,
    WeightedOperator,
)
from archnet.quant import BiasQuantizer, Quantizer

# Emitters take (writer, step name, operator, shape of the result per sample, input values).
Emitter = Callable[..., Value]
_EMITTERS: dict[type[Operator], Emitter] = {}


def emits(operator: type[Operator]) -> Callable[[Emitter], Emitter]:
    """Register the function that writes ``operator``."""

    def register(emitter: Emitter) -> Emitter:
        _EMITTERS[operator] = emitter
        return emitter

    return register


def emit(
    writer: Writer, name: str, operator: Operator, shape: tuple[int, ...], *inputs: Value
) -> Value:
    """Write one step of a student: ``operator`` on ``inputs``, giving (batch, *shape)."""
    if type(operator) not in _EMITTERS:
        raise ExportError(f"step {name}: no way to write a {type(operator).__name__} to ONNX")
    return _EMITTERS[type(operator)](writer, name, operator, (-1, *shape), *inputs)


def parameters(writer: Writer, name: str, op: WeightedOperator) -> tuple[str, str]:
    """Weight and bias: integers and a DequantizeLinear where a quantizer is, else float."""
    weights, biases = op.weight_quantizer, op.bias_quantizer
    if weights is None:
        weight = writer.constant(f"{name}.weight", op.weight.detach().cpu(), np.float32)
    else:
        assert isinstance(weights, Quantizer)
        integers = weights.integers(op.weight)
        weight = writer.weight(
            f"{name}.weight", integers, weights.scale, weights.bits, is_constant=not op.trainable
        )
    if biases is None:
        bias = writer.constant(f"{name}.bias", op.bias.detach().cpu(), np.float32)
    else:
        assert isinstance(biases, BiasQuantizer)
        bias = writer.bias(f"{name}.bias", biases.integers(op.bias), biases.step())
    return weight, bias


@emits(Convolution)
def _convolution(
    writer: Writer, name: str, op: Convolution, shape: tuple[int, ...], x: Value
) -> Value:
    if op.groups > 1 and op.copies > 1:
        raise ExportError(f"step {name}: a grouped convolution on copies is written in lanes alone")
    writer.node(
        "Conv",
        [writer.floating(x), *parameters(writer, name, op)],
        name,
        kernel_shape=op.kernel,
        strides=op.stride,
        pads=[*op.padding, *op.padding],
        dilations=op.dilation,
        group=op.groups,
    )
    return Value(name, name, shape)


@emits(FullyConnected)
def _fully_connected(
    writer: Writer, name: str, op: FullyConnected, shape: tuple[int, ...], x: Value
) -> Value:
    if len(shape) > 2 and (op.weight_quantizer is None or not writer.rows):
        # Compilers know it so, as torch writes it; a Gemm would want rows, and reshapes around it.
        weight, bias = parameters(writer, name, op)
        wide = writer.widened(shape)
        if wide != shape:
            x = x.reshaped((*wide[:-1], op.in_features), f"{name}.wide")
        tensor = name if wide == shape else f"{name}.flat"
        factors = [writer.floating(x), writer.turned(weight)]
        if bool(op.bias.any()):
            writer.node("Add", [writer.node("MatMul", factors, f"{name}.product"), bias], tensor)
        else:
            writer.node("MatMul", factors, tensor)
            del writer.constants[bias]
        return Value(name, tensor, wide).reshaped(shape, name)
    # Quantized, it is a Gemm on (positions, features): runtimes have integer kernels that take the
    # bias for a Gemm, and none for a MatMul.
    rows = x.reshaped((-1, op.in_features), f"{name}.rows")
    tensor = name if len(shape) == 2 else f"{name}.flat"
    inputs = [writer.floating(rows), *parameters(writer, name, op)]
    writer.node("Gemm", inputs, tensor, alpha=1.0, beta=1.0, transA=0, transB=1)
    return Value(name, tensor, (-1, op.out_features)).reshaped(shape, name)


@emits(BatchNorm)
def _batch_norm(
    writer: Writer, name: str, op: BatchNorm, shape: tuple[int, ...], x: Value
) -> Value:
    statistics: dict[str, Any] = {
        "weight": op.weight,
        "bias": op.bias,
        "mean": op.running_mean,
        "var": op.running_var,
    }
    constants = [
        writer.constant(f"{name}.{key}", tensor.detach().cpu(), np.float32)
        for key, tensor in statistics.items()
    ]
    writer.node("BatchNormalization", [writer.floating(x), *constants], name, epsilon=op.eps)
    return Value(name, name, shape)


@emits(MatMul)
def _product(
    writer: Writer, name: str, op: MatMul, shape: tuple[int, ...], x: Value, y: Value
) -> Value:
    rank = len(shape)
    order = (*range(rank - 2), rank - 1, rank - 2)
    right = y.transposed(order, f"{name}.right") if op.transposed else y
    factors = [writer.floating(x), writer.floating(right)]
    if op.factor == 1:
        writer.node("MatMul", factors, name)
    else:
        product = writer.node("MatMul", factors, f"{name}.product")
        factor = writer.constant(f"{name}.factor", op.factors(), np.float32)
        writer.node("Mul", [product, factor], name)
    return Value(name, name, shape)


@emits(Softmax)
def _softmax(writer: Writer, name: str, op: Softmax, shape: tuple[int, ...], x: Value) -> Value:
    writer.node("Softmax", [writer.floating(x)], name, axis=-1)
    return Value(name, name, shape)


@emits(Multiply)
def _multiply(
    writer: Writer, name: str, op: Multiply, shape: tuple[int, ...], x: Value, y: Value
) -> Value:
    writer.node("Mul", [writer.floating(x), writer.floating(y)], name)
    return Value(name, name, shape)


@emits(LayerNorm)
def _layer_norm(
    writer: Writer, name: str, op: LayerNorm, shape: tuple[int, ...], x: Value
) -> Value:
    if writer.opset < 17:
        raise ExportError(f"step {name}: a layer norm needs opset=17 or more")
    constants = [
        writer.constant(f"{name}.{key}", tensor.detach().cpu(), np.float32)
        for key, tensor in (("weight", op.weight), ("bias", op.bias))
    ]
    inputs = [writer.floating(x), *constants]
    writer.node("LayerNormalization", inputs, name, axis=-1, epsilon=op.eps)
    return Value(name, name, shape)


# ONNX's operators for functions, and the first opset that has each.
_FUNCTIONS = {
    "gelu": ("Gelu", 20),
    "hardswish": ("HardSwish", 14),
    "sigmoid": ("Sigmoid", 13),
    "tanh": ("Tanh", 13),
    "elu": ("Elu", 13),
    "softplus": ("Softplus", 13),
    "mish": ("Mish", 18),
    "erf": ("Erf", 13),
    "exp": ("Exp", 13),
    "log": ("Log", 13),
    "sqrt": ("Sqrt", 13),
    "sin": ("Sin", 13),
    "cos": ("Cos", 13),
}
_ATTRIBUTES: dict[str, dict[str, Any]] = {"gelu": {"approximate": "none"}, "elu": {"alpha": 1.0}}


@emits(Function)
def _function(writer: Writer, name: str, op: Function, shape: tuple[int, ...], x: Value) -> Value:
    # Element by element, so it goes before the moves that are still to be made.
    tensor = name if not x.moves else f"{name}.flat"
    source, (kind, opset) = writer.dequantized(x.tensor, x.grid), _FUNCTIONS[op.kind]
    if op.kind == "gelu" and (op.parts or writer.opset < opset):
        numbers = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
        root, one, half = (
            writer.constant(f"{name}.{key}", value, np.float32) for key, value in numbers.items()
        )
        scaled = writer.node("Div", [source, root], f"{name}.scaled")
        erf = writer.node("Erf", [scaled], f"{name}.erf")
        above = writer.node("Add", [erf, one], f"{name}.above")
        twice = writer.node("Mul", [source, above], f"{name}.twice")
        writer.node("Mul", [twice, half], tensor)
    elif writer.opset < opset:
        raise ExportError(f"step {name}: {kind} needs opset={opset} or more")
    else:
        writer.node(kind, [source], tensor, **_ATTRIBUTES.get(op.kind, {}))
    return Value(name, tensor, x.shape, None, x.moves)


@emits(MaxPool)
def _max_pool(writer: Writer, name: str, op: MaxPool, shape: tuple[int, ...], x: Value) -> Value:
    left, right, top, bottom = op.padding
    if max(top, bottom) >= op.kernel[0] or max(left, right) >= op.kernel[1]:
        raise ExportError(f"step {name}: ONNX needs a max-pooling's padding below its window")
    writer.carried(
        "MaxPool",
        [writer.tensor(x)],
        x.grid,
        name,
        kernel_shape=op.kernel,
        strides=op.stride,
        pads=[top, left, bottom, right],
        dilations=op.dilation,
        ceil_mode=0,
        storage_order=0,
    )
    return Value(name, name, shape, x.grid)


@emits(Add)
def _add(writer: Writer, name: str, op: Add, shape: tuple[int, ...], *xs: Value) -> Value:
    first, *others = [writer.floating(x) for x in xs]
    for index, other in enumerate(others):
        is_last = index == len(others) - 1
        output = name if is_last else f"{name}.{index}"
        first = writer.node("Add", [first, other], output)
    return Value(name, name, shape)


@emits(AddConstant)
def _add_constant(
    writer: Writer, name: str, op: AddConstant, shape: tuple[int, ...], x: Value
) -> Value:
    constant = writer.constant(f"{name}.constant", op.bias.detach().cpu()[None], np.float32)
    writer.node("Add", [writer.floating(x), constant], name)
    return Value(name, name, shape)


@emits(AveragePool)
def _average_pool(
    writer: Writer, name: str, op: AveragePool, shape: tuple[int, ...], x: Value
) -> Value:
    if not op.is_mean:
        raise ExportError(
            f"step {name}: ONNX's AveragePool divides by the pixels of its window, and this one "
            "divides by another number"
        )
    writer.node(
        "AveragePool",
        [writer.floating(x)],
        name,
        kernel_shape=op.kernel,
        strides=op.stride,
        pads=[*op.padding, *op.padding],
        count_include_pad=1,
        ceil_mode=0,
    )
    return Value(name, name, shape)


@emits(Mean)
def _mean(writer: Writer, name: str, op: Mean, shape: tuple[int, ...], x: Value) -> Value:
    kind = "ReduceSum" if op.factor == 1 else "ReduceMean"
    if kind == "ReduceMean" and op.factor != 1 / op.terms([x.moved_shape[1:]]):
        raise ExportError(f"step {name}: ONNX has no reduction that multiplies by {op.factor:g}")
    source = writer.floating(x)
    # Axes became an input of ReduceSum in opset 13, of ReduceMean in opset 18.
    if kind == "ReduceSum" or writer.opset >= 18:
        axes = writer.constant(f"{name}.axes", op.axes, np.int64)
        writer.node(kind, [source, axes], name, keepdims=0)
    else:
        writer.node(kind, [source], name, axes=op.axes, keepdims=0)
    return Value(name, name, shape)


def common_grid(xs: Sequence[Value]) -> Grid | None:
    """The grid that all of these values are on; None where they are not, or are floats."""
    return xs[0].grid if len({x.grid for x in xs}) == 1 else None


@emits(Concat)
def _concat(writer: Writer, name: str, op: Concat, shape: tuple[int, ...], *xs: Value) -> Value:
    grid = common_grid(xs)
    read = writer.floating if grid is None else writer.tensor
    writer.carried("Concat", [read(x) for x in xs], grid, name, axis=op.axis)
    return Value(name, name, shape, grid)


@emits(Activation)
def _activation(
    writer: Writer, name: str, op: Activation, shape: tuple[int, ...], x: Value
) -> Value:
    # Element by element, so it goes before the moves that are still to be made.
    tensor = name if not x.moves else f"{name}.flat"
    source = writer.dequantized(x.tensor, x.grid)
    if op.quantizer is not None:
        grid = _quantize(writer, name, tensor, source, op)
        return Value(name, tensor, x.shape, grid, x.moves)
    if op.low == -math.inf and op.high == math.inf:
        return replace(x, name=name)
    if op.low == 0 and op.high == math.inf:
        writer.node("Relu", [source], tensor)
    else:
        bounds = [
            writer.constant(f"{name}.{key}", bound, np.float32) if math.isfinite(bound) else ""
            for key, bound in (("low", op.low), ("high", op.high))
        ]
        writer.node("Clip", [source, *bounds], tensor)
    return Value(name, tensor, x.shape, None, x.moves)


def _quantize(writer: Writer, name: str, tensor: str, source: str, op: Activation) -> Grid | None:
    """Float to the grid. A ReLU is the lowest integer of an unsigned grid and costs nothing."""
    quantizer = op.quantizer
    assert isinstance(quantizer, Quantizer)
    grid = writer.placed(name, quantizer)
    return writer.rounded(tensor, source, grid, *quantizer.bounds(op.low, op.high))


@emits(Permute)
def _permute(writer: Writer, name: str, op: Permute, shape: tuple[int, ...], x: Value) -> Value:
    return x.transposed(op.order, name)


@emits(Reshape)
def _reshape(writer: Writer, name: str, op: Reshape, shape: tuple[int, ...], x: Value) -> Value:
    return x.reshaped(shape, name)


@emits(Slice)
def _slice(writer: Writer, name: str, op: Slice, shape: tuple[int, ...], x: Value) -> Value:
    window = {"starts": op.start, "ends": op.stop, "axes": op.axis, "steps": op.step}
    constants = [writer.constant(f"{name}.{k}", [v], np.int64) for k, v in window.items()]
    writer.carried("Slice", [writer.tensor(x)], x.grid, name, constants=constants)
    return Value(name, name, shape, x.grid)


def emit_split(
    writer: Writer, names: Sequence[str], cuts: Sequence[Slice], shapes: Any, x: Value
) -> list[Value]:
    """Slices that part a whole axis, one behind the other, as one node."""
    sizes = writer.constant(f"{names[0]}.sizes", [op.stop - op.start for op in cuts], np.int64)
    axis = cuts[0].axis
    writer.carried("Split", [writer.tensor(x)], x.grid, *names, constants=[sizes], axis=axis)
    return [Value(name, name, (-1, *shapes[name]), x.grid) for name in names]


@emits(Pad)
def _pad(writer: Writer, name: str, op: Pad, shape: tuple[int, ...], x: Value) -> Value:
    # ONNX lists all beginnings, then all ends; the batch is not padded.
    pads = [0, *(before for before, _ in op.pads), 0, *(after for _, after in op.pads)]
    constants = [writer.constant(f"{name}.pads", pads, np.int64)]
    writer.carried("Pad", [writer.tensor(x)], x.grid, name, constants=constants)
    return Value(name, name, shape, x.grid)
