"""The TensorFlow Lite file gives the integers of the golden model, and Vela compiles it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import archnet
from archnet.deploy import ExportError
from archnet.deploy.integer import IntegerGrid, Requantization, to_integers
from archnet.deploy.tflite import _headroom, _moved, _simplified, affine, to_tflite
from archnet.deploy.writer import Reshape as PendingReshape
from archnet.deploy.writer import Transpose, Value
from archnet.ops import (
    Activation,
    Concat,
    Convolution,
    FullyConnected,
    MaxPool,
    Permute,
    Reshape,
    Slice,
)
from archnet.ops.scores import each
from archnet.quant import Recipe, quantize, settle
from archnet.teachers.nets import CifarResNet, DigitNet
from test_c_header import NETWORKS
from test_deploy import TO_LAST, chain, student

# Steps of 16-bit outputs: half of one, and as much for the 16 bits of the runtime's multiplier.
# Another integer anywhere in the network moves outputs by more.
ROUNDED = 1
SLICE_STEPS = st.integers(1, 3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def interpreted(content, integers):
    """Of every output the numbers (N, ...), and the size of their step."""
    runtime = pytest.importorskip("ai_edge_litert.interpreter")
    network = runtime.Interpreter(model_content=content)
    network.allocate_tensors()
    (given,), results = network.get_input_details(), network.get_output_details()
    found = [[] for _ in results]
    for sample in integers:
        stored = sample.transpose(1, 2, 0) if sample.ndim == 3 else sample
        stored = stored + given["quantization"][1]
        network.set_tensor(given["index"], stored[None].astype(np.int8))
        network.invoke()
        for kept, result in zip(found, results, strict=True):
            kept.append(network.get_tensor(result["index"])[0])
    grids = [result["quantization"] for result in results]
    return [
        ((np.stack(kept).astype(np.int64) - zero) * scale, scale)
        for kept, (scale, zero) in zip(found, grids, strict=True)
    ]


def quantized(net, weight_bits, act_bits):
    x = torch.randn(16, *net.graph.shapes["x"])
    quantize(
        net,
        Recipe(weight_bits, act_bits, first_bits=min(5, weight_bits), last_bits=8),
        calibration=[x],
    )
    settle(net)
    return net, 2 * x


def differences(net, x):
    """Distances of all numbers of the file's outputs from PyTorch's, in steps of the output."""
    model = to_integers(net)
    entry = model.steps[0].name
    values = model.run(x.numpy(), [entry])
    found = interpreted(to_tflite(model), values[entry])
    with torch.no_grad():
        expected = each(net.double()(x.double()))
    net.float()
    pairs = zip(found, expected, strict=True)
    return np.concatenate(
        [(np.abs(ours - theirs.numpy()) / scale).reshape(-1) for (ours, scale), theirs in pairs]
    )


# The runtime ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(1, 2), (2, 4), (3, 6), (4, 4), (8, 8)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_runtime_gives_what_pytorch_gives(name, bits):
    assert differences(*quantized(NETWORKS[name](), *bits)).max() < ROUNDED


@pytest.mark.parametrize(
    ("teacher", "shape"), [(CifarResNet(8, width=4), (3, 12, 12)), (DigitNet(4), (1, 12, 12))]
)
def test_converted_teachers_too(teacher, shape):
    net = archnet.convert(teacher.eval(), torch.zeros(1, *shape))
    assert differences(*quantized(net, 2, 4)).max() < ROUNDED


def test_signed_grids_below_a_byte_are_clipped_at_both_ends():
    convolutions = Convolution(4, 4), Activation(0), Convolution(4, 2)
    pool = MaxPool(1, (1, 0, 0, 1))
    net = chain((3, 6, 6), Convolution(3, 4), Activation(), pool, *convolutions)
    net, x = quantized(net, 4, 4)
    model = to_integers(net)
    values = model.run(3 * x.numpy(), ["s0"])["s0"]
    assert (values.min(), values.max()) == (-8, 7)
    assert operators(to_tflite(model)).count("MAXIMUM") == 1
    assert differences(net, 3 * x).max() < ROUNDED


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 8), (8, 7)])
def test_windows_begin_where_ours_begin(stride, size):
    net = chain(
        (2, *size), Convolution(2, 3, stride=stride), Activation(0), MaxPool(2), Convolution(3, 2)
    )
    assert differences(*quantized(net, 4, 4)).max() < ROUNDED


def test_operators_of_another_grid_requantize():
    net = student(
        (4, 6),
        ("fc", FullyConnected(6, 4), "x"),
        ("fine", Activation(), "fc"),
        ("coarse", Activation(0), "fine"),
        ("head", FullyConnected(4, 3), "coarse"),
    )
    assert differences(*quantized(net, 4, 4)).max() < ROUNDED


def sliced(axis, start, stop, step):
    """A convolution, a slice of its map, and a layer that looks at all that is left."""
    shape = [5, 6, 7]
    shape[axis - 1] = len(range(*slice(start, stop, step).indices(shape[axis - 1])))
    return student(
        (3, 6, 7),
        ("stem", Convolution(3, 5), "x"),
        ("relu", Activation(), "stem"),
        ("part", Slice(axis, start, stop, step), "relu"),
        ("flat", Reshape((math.prod(shape),)), "part"),
        ("head", FullyConnected(math.prod(shape), 4), "flat"),
    )


@given(axis=st.integers(1, 3), start=st.integers(0, 4), more=st.integers(1, 7), step=SLICE_STEPS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_a_slice_takes_what_ours_takes(axis, start, more, step):
    torch.manual_seed(0)
    net = sliced(axis, start, min(start + more, (5, 6, 7)[axis - 1]), step)
    assert differences(*quantized(net, 4, 8)).max() < ROUNDED


# The file ---------------------------------------------------------------------------------------


def operators(content):
    """The names of a file's operators, in order, as the schema classes of Vela read them."""
    pytest.importorskip("ethosu.vela.tflite.Model")
    from ethosu.vela.tflite.BuiltinOperator import BuiltinOperator
    from ethosu.vela.tflite.Model import Model

    names = {number: name for name, number in vars(BuiltinOperator).items()}
    model = Model.GetRootAs(content)
    graph = model.Subgraphs(0)
    codes = [graph.Operators(index).OpcodeIndex() for index in range(graph.OperatorsLength())]
    return [names[model.OperatorCodes(code).BuiltinCode()] for code in codes]


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_slice_has_strides_that_every_ethos_u_takes(axis):
    """Vela leaves a STRIDED_SLICE with another stride than 1 to the CPU for Ethos-U55."""
    found = operators(to_tflite(to_integers(quantized(sliced(axis, 1, 5, 2), 4, 8)[0])))
    assert found.count("MAX_POOL_2D") == 1
    found = operators(to_tflite(to_integers(quantized(sliced(axis, 0, 9, 2), 4, 8)[0])))
    assert "STRIDED_SLICE" not in found
    found = operators(to_tflite(to_integers(quantized(sliced(axis, 1, 5, 1), 4, 8)[0])))
    assert "MAX_POOL_2D" not in found


def test_moves_round_a_fully_connected_layer_cancel():
    net = student(
        (3, 8, 8),
        ("stem", Convolution(3, 8), "x"),
        ("relu", Activation(0), "stem"),
        ("last", Permute(TO_LAST), "relu"),
        ("lanes", Reshape((8, 8, 2, 4)), "last"),
        ("join", Concat(4), "lanes", "lanes"),
        ("fc", FullyConnected(8, 4), "join"),
        ("sum", Activation(0), "fc"),
        ("map", Reshape((8, 8, 8)), "sum"),
        ("first", Permute((0, 3, 1, 2)), "map"),
        ("pool", MaxPool(), "first"),
        ("flat", Reshape((128,)), "pool"),
        ("head", FullyConnected(128, 10), "flat"),
    )
    net, x = quantized(net, 2, 4)
    found = operators(to_tflite(to_integers(net)))
    assert "TRANSPOSE" not in found
    assert [name for name in found if name != "RESHAPE"] == [
        "CONV_2D",
        "CONCATENATION",
        "CONV_2D",
        "MAX_POOL_2D",
        "QUANTIZE",
        "CONV_2D",
    ]
    assert differences(net, x).max() < ROUNDED


@given(data=st.data(), shape=st.permutations([1, 1, 2, 3, 4]))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_moves_are_made_with_no_more_transpositions_than_they_have(data, shape):
    moves, value = [], Value("x", "x", (1, *shape))
    for _ in range(data.draw(st.integers(0, 6))):
        before = replace(value, moves=tuple(moves)).moved_shape
        order = data.draw(st.permutations(range(1, len(before))))
        drawn = st.sampled_from([(1, 24), (1, 4, 6), (1, 2, 3, 4), (1, 2, 1, 12), (1, *before, 1)])
        shapes = drawn.filter(lambda to: math.prod(to) == 24)
        move = st.one_of(st.just(Transpose((0, *order))), st.builds(PendingReshape, shapes))
        moves.append(data.draw(move))
    left = _simplified(replace(value, moves=tuple(moves)))
    x = np.arange(24).reshape(value.shape)
    np.testing.assert_array_equal(_moved(x, left), _moved(x, moves))
    turns = [move for move in left if isinstance(move, Transpose)]
    assert len(turns) <= sum(isinstance(move, Transpose) for move in moves)


@given(scale=st.floats(-4, 4, width=32), offset=st.floats(-300, 300, width=32))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_a_batch_norm_is_a_weight_and_a_bias(scale, offset):
    x = np.arange(-255, 256)
    wanted = Requantization("multiplier", np.array([scale]), -128, 127, np.array([offset]))
    weight, bias, unit = affine(wanted, x)
    assert unit > 0
    found = (int(weight[0]) * x + int(bias[0])) * unit[0]
    # A rounded bias, and what a slope near zero loses over a whole grid.
    assert np.abs(found - (scale * x + offset)).max() <= abs(scale) / 128 + 1e-2
    # Integers are others only next to a border between two.
    other = np.clip(np.rint(found), -128, 127) != wanted(x[:, None], 1)[:, 0]
    assert other.mean() <= 0.01


def test_narrow_weights_use_all_of_int8_and_no_accumulator_overflows():
    weight = np.array([[-2, 1], [0, 1]])
    assert _headroom(weight, 12) == 63
    assert _headroom(weight, 27) == 16
    assert _headroom(np.array([[-128, 127]]), 20) == 1


def test_values_that_meet_and_fit_no_byte_together_are_an_error():
    net = chain((3, 6, 6), Convolution(3, 4), Activation(0), Convolution(4, 2))
    net, _ = quantized(net, 8, 8)
    model = to_integers(net)
    model.grids["s0"] = IntegerGrid(1.0, -1, 255)
    with pytest.raises(ExportError, match=r"step s0: its integers -1 to 255, or others that share"):
        to_tflite(model)


def test_an_input_on_several_grids_is_an_error():
    model = to_integers(quantized(NETWORKS["residual"](), 4, 4)[0])
    model.steps[3] = replace(model.steps[3], inputs=(model.input,))
    with pytest.raises(ExportError, match=r"an input with one scale, and .* read it"):
        to_tflite(model)
