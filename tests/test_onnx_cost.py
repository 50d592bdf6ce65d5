"""What an ONNX file costs: batches, sizes that are computed, open sizes, widths, odd files."""

import importlib
import itertools
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import archnet
from archnet.cli import main
from archnet.deploy import to_onnx
from archnet.errors import ConfigError
from archnet.hardware import (
    AuditError,
    Product,
    SystolicArray,
    audit,
    cycles,
    input_shapes,
    onnx_cost,
    student_cost,
)
from archnet.ops import (
    Activation,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    MaxPool,
    Pad,
    Permute,
    Reshape,
    Slice,
    Step,
    Student,
    StudentGraph,
)
from archnet.quant import Recipe, quantize

ROOT = Path(__file__).resolve().parents[1]
FLOAT = TensorProto.FLOAT


def node(operator, *inputs, output="out", **attributes):
    return helper.make_node(operator, inputs, [output], name=f"the {operator}", **attributes)


def model(nodes, inputs, opset=21, domains=(), functions=(), rank=None, **constants):
    """A model whose last node gives the output; inputs are shapes, or (type, shape), by name."""
    described = []
    for name, item in inputs.items():
        kind, shape = item if len(item) == 2 and isinstance(item[1], tuple) else (FLOAT, item)
        described.append(helper.make_tensor_value_info(name, kind, shape))
    output = helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, [None] * (rank or 4))
    stored = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), key)
        for key, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "anybody's", described, [output], stored)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(x, 1) for x in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def rows(cost):
    return {step.name: step for step in cost.steps}


# Batch --------------------------------------------------------------------------------------

CONV_MACS = 6 * 6 * 6 * 4 * 9
SECOND = [(2, "N", 4), (1, 4), (7,), (), ("N", 4), (None, 4), (2, 8, 4), ("T", 4), (3, 4, 5)]


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("batch", ["N", None, "?", -1, 1, 8])
def test_a_second_input_does_not_change_what_a_sample_costs(batch, second):
    file = model(
        [node("Conv", "x", "w")], {"x": (batch, 4, 8, 8), "y": second}, w=zeros(6, 4, 3, 3)
    )
    if batch == -1:
        file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    cost = onnx_cost(file)
    assert cost.macs == cost.steps[0].macs == CONV_MACS
    assert cost.parameters == 6 * 4 * 9
    assert cost.batch == (batch if batch == 8 else 1)
    if all(isinstance(size, int) for size in second):
        assert cost.activation_bytes == 4 * (256 + 6 * 36) + 4 * int(
            np.prod(second) // (cost.batch if cost.batch in second else 1)
        )


def test_an_open_axis_of_another_name_is_no_batch():
    nodes = [node("MatMul", "y", "v", output="h"), node("MatMul", "x", "w")]
    file = model(nodes, {"x": ("N", 4), "y": ("T", 4)}, rank=2, v=zeros(4, 3), w=zeros(4, 5))
    cost = onnx_cost(file)
    assert cost.macs is None
    assert cost.inputs == {"x": (1, 4), "y": (None, 4)}
    assert onnx_cost(file, {"y": (6, 4)}).macs == 6 * 12 + 20
    # One that the file does not name is the batch, too.
    file.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "unk__7"
    assert onnx_cost(file).macs == 12 + 20


def test_what_does_not_depend_on_the_batch_is_not_divided_by_it():
    nodes = [node("MatMul", "y", "w", output="h"), node("Add", "x", "h")]
    inputs = {"x": (8, 16, 5), "y": (16, 4)}
    assert onnx_cost(model(nodes, inputs, w=zeros(4, 5))).macs == 16 * 4 * 5
    nodes = [node("MatMul", "x", "w", output="h"), node("Add", "h", "y")]
    assert onnx_cost(model(nodes, {"x": (8, 16, 4), "y": (16, 5)}, w=zeros(4, 5))).macs == 320


@pytest.mark.parametrize("batch", ["N", 1, 2, 5])
@pytest.mark.parametrize(("a", "b"), itertools.product((0, 1), repeat=2))
def test_gemm_in_every_orientation(batch, a, b):
    """(batch, 7) x (7, 3), either of them transposed."""
    nodes = [node("Gemm", "x", "w", transA=a, transB=b)]
    shape = (batch, 7) if not a else (7, batch)
    file = model(nodes, {"x": shape}, rank=2, w=zeros(*((3, 7) if b else (7, 3))))
    given = None
    if a and batch == "N":
        given = {"": (7, 1)}
    cost = onnx_cost(file, given)
    assert cost.macs == 21 * (batch if a and batch != "N" else 1)
    nodes = [node("Transpose", "x", output="t", perm=[1, 0]), node("Gemm", "t", "w", transA=1)]
    assert onnx_cost(model(nodes, {"x": (batch, 7)}, rank=2, w=zeros(7, 3))).macs == 21


# Sizes that are computed --------------------------------------------------------------------


def computed_pads():
    """Pad bounds as torch's older exporters write them: through seven operators."""
    nodes = [
        node(
            "ConstantOfShape",
            "four",
            output="rest",
            value=numpy_helper.from_array(zeros(1, dtype=np.int64)),
        ),
        node("Concat", "some", "rest", output="all", axis=0),
        node("Reshape", "all", "pairs", output="rows"),
        node("Slice", "rows", "start", "end", "axis", "step", output="reversed"),
        node("Transpose", "reversed", output="sides", perm=[1, 0]),
        node("Reshape", "sides", "flat", output="line"),
        node("Cast", "line", output="pads", to=TensorProto.INT64),
        node("Pad", "x", "pads", "zero", output="padded"),
        node("Conv", "padded", "w"),
    ]
    return nodes, {
        "some": np.array([1, 2, 0, 1]),
        "four": np.array([4]),
        "pairs": np.array([-1, 2]),
        "start": np.array([-1]),
        "end": np.array([-(2**31)]),
        "axis": np.array([0]),
        "step": np.array([-1]),
        "flat": np.array([-1]),
        "zero": np.float32(0),
        "w": zeros(6, 4, 3, 3),
    }


def test_bounds_that_constants_make_are_computed():
    nodes, constants = computed_pads()
    cost = onnx_cost(model(nodes, {"x": ("N", 4, 8, 8)}, **constants))
    # One pixel before and two behind the last axis, one behind the one before it.
    assert cost.macs == (8 + 1 - 2) * (8 + 3 - 2) * 6 * 36
    assert cost.activation_bytes is not None


SIZES = {
    "reshape": [node("Mul", "s", "one", output="t"), node("Reshape", "x", "t", output="h")],
    "expand": [node("Max", "s", "one", output="t"), node("Expand", "x", "t", output="h")],
    "resize": [
        node("Cast", "s", output="f", to=FLOAT),
        node("Div", "f", "two", output="g"),
        node("Cast", "g", output="t", to=TensorProto.INT64),
        helper.make_node("Resize", ["x", "", "", "t"], ["h"]),
    ],
    "where": [
        node("Equal", "s", "one", output="q"),
        node("Where", "q", "one", "s", output="t"),
        node("Reshape", "x", "t", output="h"),
    ],
    "gather and range": [
        node("Gather", "s", "third", output="a", axis=0),
        node("Range", "none", "a", "unit", output="r"),
        node("Gather", "x", "r", output="h", axis=2),
    ],
    "scatter": [
        node("ScatterElements", "s", "place", "eight", output="t", axis=0),
        node("Reshape", "x", "t", output="h"),
    ],
}


@pytest.mark.parametrize("name", SIZES)
def test_arithmetic_on_a_shape_gives_shapes(name):
    nodes = [node("Shape", "x", output="s"), *SIZES[name], node("Conv", "h", "w")]
    constants = {
        "one": np.array([1, 1, 1, 1]),
        "two": np.array([1, 1, 2, 2], np.float32),
        "third": np.array(2),
        "none": np.array(0),
        "unit": np.array(1),
        "place": np.array([2]),
        "eight": np.array([8]),
    }
    cost = onnx_cost(model(nodes, {"x": ("N", 4, 8, 8)}, w=zeros(6, 4, 3, 3), **constants))
    pixels = 2 * 2 if name == "resize" else 6 * 6
    assert cost.macs == pixels * 6 * 36


def test_a_branch_whose_condition_is_known_is_taken():
    def branch(name, nodes):
        return helper.make_graph(
            nodes,
            name,
            [],
            [helper.make_tensor_value_info("r", FLOAT, [None] * 4)],
            [numpy_helper.from_array(zeros(6, 4, 3, 3), "w")] if name == "yes" else [],
        )

    def file(size, condition):
        nodes = [
            *condition,
            node(
                "If",
                "c",
                output="h",
                then_branch=branch("yes", [node("Conv", "x", "w", output="r")]),
                else_branch=branch("no", [node("Identity", "x", output="r")]),
            ),
            node("Conv", "h", "v"),
        ]
        channels = np.array([4])
        return model(
            nodes,
            {"x": ("N", size, 8, 8), "k": (TensorProto.BOOL, ())},
            n=channels,
            i=np.array([1]),
            v=zeros(5, 6, 1, 1),
        )

    by_size = [
        node("Shape", "x", output="s"),
        node("Gather", "s", "i", output="g", axis=0),
        node("Equal", "g", "n", output="c"),
    ]
    taken = onnx_cost(file(4, by_size))
    assert taken.macs == CONV_MACS + 36 * 30
    assert taken.parameters == 6 * 36 + 30
    other = onnx_cost(file(6, by_size))
    assert (other.macs, other.parameters) == (64 * 30, 30)
    at_run_time = onnx_cost(file(4, [node("Identity", "k", output="c")]))
    assert at_run_time.macs is None
    assert at_run_time.uncounted["Conv inside of If"] == 1
    assert "the If" in at_run_time.unknown


# Open sizes ---------------------------------------------------------------------------------


def detector():
    nodes = [
        node("Conv", "x", "w", output="h"),
        node("ConvTranspose", "h", "v", strides=[2, 2]),
    ]
    nodes[1].name = "up"
    return model(
        nodes, {"x": ("N", 4, "height", "width")}, w=zeros(6, 4, 3, 3), v=zeros(6, 5, 2, 2)
    )


def test_no_total_where_a_layer_is_unknown():
    cost = onnx_cost(detector())
    assert cost.macs is None
    assert cost.bops is None
    assert cost.unknown == ("the Conv", "up")
    assert all(cycles(step, SystolicArray()) is None for step in cost.steps)
    assert cost.parameters == 6 * 36 + 120
    cost = onnx_cost(detector(), {"": (1, 4, 8, 8)})
    assert (cost.unknown, cost.macs) == ((), CONV_MACS + 36 * 6 * 5 * 4)
    assert rows(cost)["up"].products == (Product(36, 20, 6),)
    assert onnx_cost(detector(), {"x": (3, 4, 8, 8)}).macs == cost.macs


def test_the_command_says_what_is_unknown_and_what_helps(tmp_path, capsys):
    path = tmp_path / "net.onnx"
    onnx.save(detector(), path)
    assert main(["cost", str(path)]) == 0
    out = capsys.readouterr().out
    total = next(line for line in out.splitlines() if "in all" in line)
    assert total.count("unknown") == 4
    assert "2 with unknown MACs: the Conv, up; state the sizes" in out
    assert "input=1x3x640x640" in out
    assert "busy" not in out
    assert main(["cost", str(path), "input=1x4x8x8", "latency=true", "runs=1"]) == 0
    out = capsys.readouterr().out
    assert "unknown" not in out
    assert "x 1x4x8x8" in out
    assert main(["audit", str(path), "hardware=rk3588", "input=x:1x4x8x8"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1x4x8", "does not fit (N, 4, height, width)"),
        ("1x3x8x8", "does not fit (N, 4, height, width)"),
        ("0x4x8x8", "impossible sizes"),
        ("1x4x9999999999x8", "impossible sizes"),
        ("y:1x4x8x8", "no input y; it has x"),
        ("1x4x8x8,1x4x8x8", "is no list of shapes"),
        ("1x4xax8", "is no list of shapes"),
        ("", "is no list of shapes"),
        ("1x4x2000000000x2000000000", "would be"),
        ("1x4x1x1", "too small"),
    ],
)
@pytest.mark.parametrize("command", ["cost", "audit"])
def test_a_shape_that_does_not_fit_is_one_line(command, text, message, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    onnx.save(detector(), path)
    assert main([command, str(path), f"input={text}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_shapes_are_read_by_name():
    assert input_shapes("1x3x640x640") == {"": (1, 3, 640, 640)}
    text = "serving:0:1x16,a,b:1x4"
    assert input_shapes(text) == {"serving:0": (1, 16), "a,b": (1, 4)}
    file = model([node("Add", "a", "b")], {"a": ("N", "T"), "b": ("N", "T")}, rank=2)
    assert onnx_cost(file, {"a": (1, 5)}).inputs == {"a": (1, 5), "b": (1, 5)}
    with pytest.raises(ConfigError, match="T is 6 here, and 5 before"):
        onnx_cost(file, {"a": (1, 5), "b": (1, 6)})
    with pytest.raises(ConfigError, match=r"has 2 inputs; it has a, b"):
        onnx_cost(file, {"": (1, 5)})


# What multiplies ----------------------------------------------------------------------------

INT8 = {"dtype": np.int8}
MICROSOFT = {"domain": "com.microsoft"}
PACKED = {"K": 8, "N": 5, "bits": 4, "block_size": 16, **MICROSOFT}
LAYERS = {
    "conv": ([node("Conv", "x", "w", group=2)], {"w": zeros(6, 2, 3, 3)}, 36 * 6 * 18),
    "transposed": (
        [node("ConvTranspose", "x", "w", group=2, strides=[2, 2])],
        {"w": zeros(4, 3, 2, 2)},
        64 * 4 * 3 * 4,
    ),
    "deformed": (
        [node("DeformConv", "x", "w", "offset")],
        {"w": zeros(6, 4, 3, 3), "offset": zeros(1, 18, 6, 6)},
        CONV_MACS,
    ),
    "matmul": ([node("MatMul", "x", "w")], {"w": zeros(8, 5)}, 32 * 40),
    "matmul, a weight a channel": ([node("MatMul", "x", "w")], {"w": zeros(4, 8, 5)}, 32 * 40),
    "matmul, weight on the left": ([node("MatMul", "w", "x")], {"w": zeros(5, 8)}, 4 * 5 * 64),
    "matmul, a vector": ([node("MatMul", "x", "w")], {"w": zeros(8)}, 32 * 8),
    "einsum": ([node("Einsum", "x", "w", equation="bchw,wo->bcho")], {"w": zeros(8, 5)}, 32 * 40),
    "einsum of a batch": (
        [node("Einsum", "x", "w", equation="b c h w, c w o -> b c h o")],
        {"w": zeros(4, 8, 5)},
        32 * 40,
    ),
    "einsum without a sum": (
        [node("Einsum", "x", "w", equation="bchw,w->bchw")],
        {"w": zeros(8)},
        0,
    ),
    "einsum of three": (
        [node("Einsum", "x", "w", "w", equation="bchw,wo,wo->bcho")],
        {"w": zeros(8, 5)},
        None,
    ),
    "fused": (
        [node("FusedConv", "x", "w", domain="com.microsoft")],
        {"w": zeros(6, 4, 3, 3)},
        CONV_MACS,
    ),
    "fused, transposed": (
        [node("FusedMatMul", "x", "w", domain="com.microsoft", transB=1)],
        {"w": zeros(5, 8)},
        32 * 40,
    ),
    "four bits": (
        [
            node(
                "MatMulNBits",
                "x",
                "w",
                "s",
                domain="com.microsoft",
                K=8,
                N=5,
                bits=4,
                block_size=16,
            )
        ],
        {"w": zeros(5, 1, 8, dtype=np.uint8), "s": zeros(5)},
        32 * 40,
    ),
    "attention of others": (
        [node("Attention", "x", "w", domain="com.microsoft", num_heads=1)],
        {"w": zeros(8, 24)},
        None,
    ),
    "a plugin with a weight": (
        [node("Secret", "x", "w", domain="com.chip")],
        {"w": zeros(8, 5)},
        None,
    ),
    "a plugin without": ([node("Secret", "x", domain="com.chip")], {}, 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_multiplies_is_counted_or_unknown(name):
    nodes, constants, expected = LAYERS[name]
    domains = ("com.microsoft", "com.chip")
    cost = onnx_cost(model(nodes, {"x": ("N", 4, 8, 8)}, domains=domains, **constants))
    assert cost.macs == expected
    assert bool(cost.unknown) == (expected is None)
    assert bool(cost.uncounted) == (not expected)


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layout", [0, 1])
def test_recurrent_layers(operator, gates, directions, layout):
    recurrent = node(
        operator,
        "x",
        "w",
        "r",
        hidden_size=5,
        direction="bidirectional" if directions == 2 else "forward",
        layout=layout,
    )
    weights = {"w": zeros(directions, 5 * gates, 3), "r": zeros(directions, 5 * gates, 5)}
    shape = ("N", 7, 3) if layout else (7, "N", 3)
    file = model([recurrent], {"x": shape}, **weights)
    cost = onnx_cost(file, {"": (1, 7, 3) if layout else (7, 1, 3)})
    assert cost.macs == 7 * directions * gates * 5 * (3 + 5)
    assert cost.parameters == directions * gates * 5 * (3 + 5)


def test_integer_operators():
    scales = {"s": np.float32(0.1), "z": np.uint8(0), "k": np.int8(0)}
    conv = node("QLinearConv", "x", "s", "z", "w", "s", "k", "s", "z", "b")
    inputs = {"x": (TensorProto.UINT8, ("N", 4, 8, 8))}
    weights = {"w": zeros(6, 4, 3, 3, **INT8), "b": zeros(6, dtype=np.int32)}
    (row,) = onnx_cost(model([conv], inputs, **weights, **scales)).steps
    assert (row.macs, row.bops, row.parameters) == (CONV_MACS, 64 * CONV_MACS, 6 * 36 + 6)
    assert row.weight_bytes == 216 + 24 + 4 + 1 + 1
    product = node("QLinearMatMul", "x", "s", "z", "w", "s", "k", "s", "z")
    weights = {"w": zeros(8, 5, **INT8)}
    (row,) = onnx_cost(model([product], inputs, **weights, **scales)).steps
    assert (row.macs, row.weight_bits, row.activation_bits) == (32 * 40, 8, 8)
    for operator in ("ConvInteger", "MatMulInteger"):
        weights = {"w": zeros(*((6, 4, 3, 3) if operator[0] == "C" else (8, 5)), **INT8)}
        (row,) = onnx_cost(model([node(operator, "x", "w")], inputs, **weights)).steps
        assert (row.weight_bits, row.activation_bits) == (8, 8)
        assert row.macs == (CONV_MACS if operator[0] == "C" else 32 * 40)


def test_a_tensor_that_several_nodes_read_is_stored_once():
    nodes = [
        node("Conv", "x", "w", "b", output="g"),
        node("Identity", "w", output="same"),
        node("Conv", "x", "same", "b", output="h"),
        node("Transpose", "t", output="turned", perm=[1, 0]),
        node("MatMul", "h", "t", output="i"),
        node("MatMul", "i", "turned"),
    ]
    constants = {"w": zeros(6, 4, 3, 3), "b": zeros(6), "t": zeros(6, 7), "unread": zeros(99)}
    cost = onnx_cost(model(nodes, {"x": ("N", 4, 8, 8)}, **constants))
    assert cost.parameters == 216 + 6 + 42
    assert cost.weight_bytes == 4 * cost.parameters
    assert cost.macs == 2 * CONV_MACS + 2 * 36 * 42


# Widths -------------------------------------------------------------------------------------


def student(shape, *steps):
    """A student on "x"; each step is (name, module, *inputs), its weights random."""
    graph = StudentGraph(
        inputs=["x"],
        outputs=[steps[-1][0]],
        steps=[Step(name, inputs, "") for name, _, *inputs in steps],
        shapes={"x": shape},
    )
    result = Student(graph, {name: module for name, module, *_ in steps}).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.normal_(0, 0.5)
    result.measure()
    return result


def chain(shape, *modules):
    names = ["x", *(f"s{index}" for index in range(len(modules)))]
    return student(shape, *zip(names[1:], modules, names, strict=False))


def branches():
    return student(
        (4, 8, 8),
        ("stem", Convolution(4, 8, stride=2), "x"),
        ("relu6", Activation(0, 6), "stem"),
        ("pool", MaxPool(1, (1, 0, 1, 0)), "relu6"),
        ("bn", BatchNorm(8), "pool"),
        ("conv", Convolution(8, 8), "bn"),
        ("join", Concat(1), "conv", "pool"),
        ("last", Permute((0, 2, 3, 1)), "join"),
        ("merge", FullyConnected(16, 6), "last"),
        ("signed", Activation(), "merge"),
        ("first", Permute((0, 3, 1, 2)), "signed"),
        ("slice", Slice(1, 1, 5), "first"),
        ("pad", Pad(((0, 0), (1, 0), (0, 1))), "slice"),
        ("valid", Convolution(4, 4, padding=0), "pad"),
        ("flat", Reshape((36,)), "valid"),
        ("head", FullyConnected(36, 10), "flat"),
    )


STUDENTS = {
    "branches": branches,
    "plain": lambda: chain(
        (3, 8, 8), Convolution(3, 4), Activation(0), Convolution(4, 4), Activation(0)
    ),
    "tokens": lambda: chain((5, 7), FullyConnected(7, 6), Activation(-1, 1), FullyConnected(6, 3)),
    "moved": lambda: chain(
        (2, 6, 6),
        Convolution(2, 4),
        Activation(0, 6),
        Slice(2, 1, 5),
        Pad(((0, 0), (1, 1), (0, 0))),
        MaxPool(),
        Reshape((4 * 3 * 3,)),
        FullyConnected(36, 4),
    ),
}


def layers(cost):
    """What multiplies, by step; the bias behind a MatMul is a node of its own."""
    others = {step.name: step.parameters for step in cost.steps if not step.macs}
    found = {}
    for step in cost.steps:
        if step.macs:
            name = step.name.removesuffix(".flat").removesuffix(".product")
            parameters = step.parameters + others.get(name, 0)
            widths = (step.weight_bits, step.activation_bits)
            found[name] = (step.macs, step.bops, *widths, parameters, step.products)
    return found


@settings(deadline=None, max_examples=12)
@given(
    name=st.sampled_from(sorted(STUDENTS)),
    form=st.sampled_from(["qdq", "subbyte", "qonnx"]),
    bits=st.tuples(*[st.integers(1, 8)] * 4),
)
def test_every_form_costs_what_its_student_costs(name, form, bits):
    torch.manual_seed(0)
    net = STUDENTS[name]()
    first, inner, acts, last = bits
    inputs = torch.randn(4, *net.graph.shapes["x"])
    quantize(net, Recipe(inner, acts, first_bits=first, last_bits=last), calibration=[inputs])
    expected, found = student_cost(net), onnx_cost(to_onnx(net, form))
    assert layers(found) == layers(expected)
    assert (found.macs, found.bops, found.parameters, found.activation_bytes) == (
        expected.macs,
        expected.bops,
        expected.parameters,
        expected.activation_bytes,
    )
    # The student's weights are packed, and have no scales.
    assert found.weight_bytes >= expected.weight_bytes


@pytest.mark.parametrize("name", STUDENTS)
def test_a_float_file_costs_what_its_student_costs(name):
    net = STUDENTS[name]()
    expected, found = student_cost(net), onnx_cost(to_onnx(net))
    assert layers(found) == layers(expected)
    assert found.parameters == expected.parameters


BETWEEN = {
    "nothing": [],
    "slice": [node("Slice", "f", "starts", "ends", output="m")],
    "pad": [node("Pad", "f", "pads", output="m")],
    "transpose": [node("Transpose", "f", output="m", perm=[0, 1, 3, 2])],
    "max-pooling": [node("MaxPool", "f", output="m", kernel_shape=[2, 2])],
    "concat": [node("Concat", "f", "f", output="m", axis=1)],
    "relu": [node("Relu", "f", output="m")],
    "clip": [node("Clip", "f", "", "six", output="m")],
    "reshape": [node("Reshape", "f", "sizes", output="m")],
    "gather": [node("Gather", "f", "places", output="m", axis=2)],
    "split": [helper.make_node("Split", ["f"], ["m", "n"], axis=2, num_outputs=2)],
    "several": [
        node("Relu", "f", output="a"),
        node("Concat", "a", "f", output="b", axis=2),
        node("Transpose", "b", output="m", perm=[0, 1, 3, 2]),
    ],
}
CONSTANTS = {
    "starts": np.array([0, 0, 1, 0]),
    "ends": np.array([1, 4, 8, 8]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "six": np.float32(6),
    "sizes": np.array([1, 4, 4, 16]),
    "places": np.array([0, 2, 4, 6]),
    "scale": np.float32(0.125),
    "low": np.uint8(0),
    "high": np.uint8(7),
}


def int4(shape, kind=TensorProto.INT4, name="w"):
    return helper.make_tensor(name, kind, shape, np.zeros(int(np.prod(shape)), np.int8))


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("clipped", [False, True])
def test_what_computes_nothing_hands_the_width_on(name, clipped):
    """UINT4 activations, or UINT8 ones clipped to three bits, and INT4 weights."""
    zero = np.uint8(0) if clipped else int4((), TensorProto.UINT4, "zero")
    nodes = [node("QuantizeLinear", "x", "scale", "zero", output="q")]
    nodes += [node("Clip", "q", "low", "high", output="c")] if clipped else []
    nodes += [
        node("DequantizeLinear", "c" if clipped else "q", "scale", "zero", output="f"),
        *BETWEEN[name],
        node("DequantizeLinear", "w", "scale", output="v"),
        node("Conv", "m" if BETWEEN[name] else "f", "v"),
    ]
    channels = 8 if name == "concat" else 4
    weights = int4((6, channels, 3, 3))
    cost = onnx_cost(model(nodes, {"x": ("N", 4, 8, 8)}, w=weights, zero=zero, **CONSTANTS))
    row = rows(cost)["the Conv"]
    assert (row.weight_bits, row.activation_bits) == (4, 3 if clipped else 4)
    assert row.bops == row.macs * 4 * row.activation_bits
    assert cost.bops == row.bops


def test_what_computes_gives_floats():
    nodes = [
        node("QuantizeLinear", "x", "scale", output="q"),
        node("DequantizeLinear", "q", "scale", output="f"),
        node("Sigmoid", "f", output="m"),
        node("Conv", "m", "w"),
    ]
    file = model(nodes, {"x": ("N", 4, 8, 8)}, w=zeros(6, 4, 3, 3), scale=np.float32(1))
    assert (rows(onnx_cost(file))["the Conv"].activation_bits) == 32
    half = model(
        [node("Conv", "x", "w")],
        {"x": (TensorProto.FLOAT16, ("N", 4, 8, 8))},
        w=zeros(6, 4, 3, 3, dtype=np.float16),
    )
    (row,) = onnx_cost(half).steps
    assert (row.weight_bits, row.activation_bits, row.weight_bytes) == (16, 16, 432)


def test_weights_clipped_in_the_file_have_the_clips_width():
    """As Brevitas writes them: QuantizeLinear, Clip, DequantizeLinear on the weight, too."""
    nodes = [
        node("QuantizeLinear", "w", "scale", "zero", output="q"),
        node("Clip", "q", "low", "high", output="c"),
        node("DequantizeLinear", "c", "scale", "zero", output="v"),
        node("Conv", "x", "v"),
    ]
    bounds = {"low": np.int8(-2), "high": np.int8(1), "zero": np.int8(0), "scale": np.float32(1)}
    cost = onnx_cost(model(nodes, {"x": ("N", 4, 8, 8)}, w=zeros(6, 4, 3, 3), **bounds))
    (row,) = cost.steps
    assert row.weight_bits == 2
    assert row.parameters == 216
    assert row.weight_bytes == 4 * 216 + 4 + 1  # what the file stores


# Audit of quantized files -------------------------------------------------------------------


def mixed_file(weights="int8", activations="uint8", second="int8"):
    """Two convolutions in QDQ format, each operand in a type, in floats, or as TensorRT has it."""
    nodes, constants = (
        [],
        {"scale": np.float32(0.5), "w0": zeros(4, 4, 3, 3), "w1": zeros(4, 4, 3, 3)},
    )
    source = "x"
    for index, (weight, values) in enumerate([(weights, activations), (second, activations)]):
        if values != "float":
            constants[f"z{index}"] = np.zeros((), values)
            nodes.append(node("QuantizeLinear", source, "scale", f"z{index}", output=f"q{index}"))
            source = f"f{index}"
            nodes.append(node("DequantizeLinear", f"q{index}", "scale", f"z{index}", output=source))
        kernel = f"w{index}"
        if weight.startswith("tensorrt"):
            constants[f"k{index}"] = np.zeros((), weight.split()[1])
            nodes.append(node("QuantizeLinear", kernel, "scale", f"k{index}", output=f"i{index}"))
            kernel = f"v{index}"
            nodes.append(node("DequantizeLinear", f"i{index}", "scale", output=kernel))
        elif weight != "float":
            constants[kernel] = zeros(4, 4, 3, 3, dtype=weight)
            kernel = f"v{index}"
            nodes.append(node("DequantizeLinear", f"w{index}", "scale", output=kernel))
        nodes.append(node("Conv", source, kernel, output=f"y{index}", pads=[1] * 4))
        nodes[-1].name = f"conv {index}"
        source = f"y{index}"
    return model(nodes, {"x": ("N", 4, 8, 8)}, **constants)


@pytest.mark.parametrize("target", ["rk3588", "imx500", "ethos_u55"])
@pytest.mark.parametrize(
    ("types", "outside"),
    [
        ({}, {}),
        ({"weights": "tensorrt int8"}, {}),
        ({"weights": "tensorrt int16"}, {"conv 0": "weights in int16"}),
        ({"second": "float"}, {"conv 1": "weights in float"}),
        (
            {"activations": "float"},
            {"conv 0": "activations in float", "conv 1": "activations in float"},
        ),
    ],
)
def test_floats_left_in_a_quantized_file_are_said(target, types, outside):
    if target == "rk3588" and types.get("weights") == "tensorrt int16":
        outside = {"conv 0": "w16a8"}
    result = audit(mixed_file(**types), target)
    found = {violation.node: violation.reason for violation in result.violations}
    assert found.keys() == outside.keys()
    assert all(found[name].startswith(reason) for name, reason in outside.items())


def test_a_target_without_types_and_a_float_file_are_as_before():
    assert audit(mixed_file(activations="float"), "arch5").pure
    result = audit(mixed_file("float", "float", "float"), "rk3588")
    assert result.pure
    assert "the file is float" in result.notes[0]


@pytest.mark.parametrize("form", ["qdq", "subbyte", "qonnx"])
def test_a_student_of_a_target_is_pure_there_in_every_form(form):
    net = STUDENTS["plain"]()
    quantize(net, Recipe(8, 8), calibration=[torch.randn(4, 3, 8, 8)])
    for name in ("rk3588", "ethos_u55", "arch5"):
        result = audit(to_onnx(net, form), name)
        assert result.pure, result.violations


# Another count ------------------------------------------------------------------------------


class Mixed(nn.Module):
    """What torch writes of convolutions of all kinds, recurrent layers and attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        y = self.up(torch.relu(self.depthwise(self.stem(x))))
        tokens = nn.functional.pad(y, (0, 1, 2, 0)).flatten(2).transpose(1, 2)
        tokens, _ = self.lstm(tokens)
        return self.head((tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens)


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_runtime_counts_alike(dynamic, tmp_path, third_party):
    """The count of `benchmarks/third_party.py`, on a file of torch's."""
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Mixed().eval(),
            torch.randn(1, 3, 8, 12),
            path,
            dynamo=False,
            input_names=["x"],
            opset_version=17,
            dynamic_axes={"x": {0: "N", 2: "H", 3: "W"}} if dynamic else None,
        )
    shapes = {"x": (1, 3, 8, 12)}
    expected = third_party.observed_macs(path, shapes)
    assert expected > 0
    assert onnx_cost(path, shapes).macs == expected
    assert (onnx_cost(path).macs is None) == dynamic


@pytest.fixture(scope="module")
def third_party():
    """The benchmark with the count of ONNX Runtime's profile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("third_party")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_onnx_runtime_counts_products_alike(third_party, data):
    """Of convolutions and products of random sizes."""

    size = st.integers(1, 6)
    groups, inner, outer = data.draw(size), data.draw(size), data.draw(size)
    kernel, stride = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    height, width = data.draw(st.integers(3, 9)), data.draw(st.integers(3, 9))
    columns = data.draw(size)
    operator = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    left = (groups * outer, inner) if operator == "Conv" else (groups * inner, outer)
    nodes = [
        node(operator, "x", "w", output="h", group=groups, strides=[stride] * 2),
        node("Shape", "h", output="s", start=3),
        node("Concat", "s", "c", output="d", axis=0),
        node("ConstantOfShape", "d", output="v"),
        node("MatMul", "h", "v", output="m"),
        node("Flatten", "m", output="f"),
        node("Gemm", "f", "f", transA=data.draw(st.integers(0, 1)), output="g"),
    ]
    nodes[-1].attribute.append(helper.make_attribute("transB", 1 - nodes[-1].attribute[0].i))
    shape = (1, groups * inner, height, width)
    w, c = zeros(*left, kernel, kernel), np.array([columns])
    file = model(nodes, {"x": ("N", *shape[1:])}, rank=2, w=w, c=c)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        onnx.save(file, path)
        assert onnx_cost(path).macs == third_party.observed_macs(path, {"x": shape})


# Odd files ----------------------------------------------------------------------------------


def with_size(size):
    file = model([node("Conv", "x", "w")], {"x": (1, 4, 8, 8)}, w=zeros(6, 4, 3, 3))
    file.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size
    return file


def with_type(kind):
    file = model([node("Conv", "x", "w")], {"x": (1, 4, 8, 8)}, w=zeros(6, 4, 3, 3))
    file.graph.input[0].type.tensor_type.elem_type = kind
    return file


def one_layer(operator, shape, weight, **attributes):
    return model([node(operator, "x", "w", **attributes)], {"x": shape}, w=zeros(*weight))


BROKEN = {
    "size -5": with_size(-5),
    "size 0": with_size(0),
    "size 2^62": with_size(2**62),
    "size 2^31": with_size(2**31),
    "type 29": with_type(29),
    "type -1": with_type(-1),
    "rank-1 weight": one_layer("Conv", ("N", 4, 8, 8), (6,)),
    "rank-2 weight": one_layer("Conv", ("N", 4, 8, 8), (6, 4)),
    "rank-1 transposed weight": one_layer("ConvTranspose", ("N", 4, 8, 8), (6,)),
    "channels": one_layer("Conv", ("N", 4, 8, 8), (6, 5, 3, 3)),
    "groups 0": one_layer("Conv", ("N", 4, 8, 8), (6, 4, 3, 3), group=0),
    "groups -1": one_layer("Conv", ("N", 4, 8, 8), (6, 4, 3, 3), group=-1),
    "groups 4 of 6": one_layer("Conv", ("N", 4, 8, 8), (6, 1, 3, 3), group=4),
    "input too small": one_layer("Conv", ("N", 4, 2, 2), (6, 4, 5, 5)),
    "stride 0": one_layer("Conv", ("N", 4, 8, 8), (6, 4, 3, 3), strides=[0, 0]),
    "depth": one_layer("MatMul", ("N", 4, 8, 8), (7, 5)),
    "no axes": one_layer("MatMul", ("N", 4, 8, 8), ()),
    "gemm of four axes": one_layer("Gemm", ("N", 4, 8, 8), (8, 5)),
    "too much memory": model(
        [node("Expand", "x", "s", output="h"), node("Relu", "h")],
        {"x": (1, 1, 1, 1)},
        s=np.array([2**30, 2**30, 1, 1]),
    ),
}


BROKEN["an equation that no inference ends at"] = model(
    [node("Einsum", "x", "w", equation="b$hw,wo->bho")], {"x": ("N", 4, 8, 8)}, w=zeros(8, 5)
)


def test_a_split_into_more_parts_than_it_has_is_refused():
    """The inference would make as many shapes as the attribute says."""
    nodes = [node("Split", "x", output="h", num_outputs=2**31, axis=1), node("Conv", "h", "w")]
    with pytest.raises(AuditError, match="has num_outputs 2147483648 and 1 outputs"):
        onnx_cost(model(nodes, {"x": ("N", 4, 8, 8)}, w=zeros(6, 4, 3, 3)))


@pytest.mark.parametrize("name", BROKEN)
def test_an_impossible_file_is_one_line(name, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    path.write_bytes(BROKEN[name].SerializeToString())
    with pytest.raises(AuditError) as error:
        onnx_cost(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert main(["cost", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_names_that_are_no_text_are_one_line():
    file = model([node("Conv", "x", "w")], {"x": ("N", 4, 8, 8)}, w=zeros(6, 4, 3, 3))
    file.graph.node[0].name = "QQQQ"
    content = file.SerializeToString().replace(b"QQQQ", b"\xff\xfe\xff\xfe")
    with pytest.raises(AuditError, match="no UTF-8"):
        onnx_cost(onnx.load_from_string(content))


@pytest.mark.parametrize(
    "operator", ["FusedMatMul", "FusedConv", "MatMulNBits", "DequantizeLinear"]
)
@pytest.mark.parametrize("inputs", [(), ("x",)])
def test_operators_of_others_without_their_inputs(operator, inputs):
    """ONNX checks only its own."""
    odd = node(operator, *inputs, output="h", domain="com.microsoft")
    file = model([odd, node("Relu", "h")], {"x": ("N", 4, 8, 8)}, domains=("com.microsoft",))
    assert onnx_cost(file).macs in (None, 0)
    quant = node("Quant", *inputs, output="h", domain="qonnx.custom_op.general")
    domains = ("qonnx.custom_op.general",)
    assert onnx_cost(model([quant, node("Relu", "h")], {"x": (1, 4)}, domains=domains)).macs == 0


@settings(deadline=None, max_examples=150, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_mutated_files_have_a_cost_or_one_line(data):
    """Edits of shapes, types, attributes and nodes, and flipped bits."""
    nodes, constants = computed_pads()
    file = model(nodes, {"x": ("N", 4, 8, 8)}, **constants)
    number = st.sampled_from([-(2**63), -5, -1, 0, 1, 3, 29, 2**31, 2**62, 2**63 - 1])
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["size", "type", "dims", "attribute", "edge", "operator"]))
        target = data.draw(st.sampled_from(list(file.graph.node)))
        tensor = data.draw(st.sampled_from(list(file.graph.initializer)))
        names = [*(x for item in file.graph.node for x in item.output), *constants, "x", ""]
        if kind == "size":
            dims = file.graph.input[0].type.tensor_type.shape.dim
            dims[data.draw(st.integers(0, 3))].dim_value = data.draw(number)
        elif kind == "type":
            tensor.data_type = data.draw(st.integers(0, 30))
        elif kind == "dims":
            tensor.dims[:] = data.draw(st.lists(number, max_size=4))
        elif kind == "attribute" and target.attribute:
            attribute = data.draw(st.sampled_from(list(target.attribute)))
            attribute.i = data.draw(number)
            attribute.ints[:] = data.draw(st.lists(number, max_size=5))
        elif kind == "edge" and target.input:
            place = data.draw(st.integers(0, len(target.input) - 1))
            target.input[place] = data.draw(st.sampled_from(names))
        else:
            other = [
                "Conv",
                "Gemm",
                "MatMul",
                "LSTM",
                "If",
                "Shape",
                "Range",
                "Tile",
                "Clip",
                "Pad",
            ]
            target.op_type = data.draw(st.sampled_from([*other, "DequantizeLinear", "Einsum"]))
    content = bytearray(file.SerializeToString())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        onnx_cost(onnx.load_from_string(bytes(content)))
    except (AuditError, DecodeError) as error:
        message = str(error)
    else:
        message = ""
    assert len(message.splitlines()) <= 1


LONG = 3000


def long_chain(name):
    constants = {"w": zeros(6, 4, 3, 3), "s": np.float32(1), "one": np.array([1, 1, 1, 1])}
    if name == "activations":
        links = [node("Relu", f"v{i}" if i else "x", output=f"v{i + 1}") for i in range(LONG)]
        return model([*links, node("Conv", f"v{LONG}", "w")], {"x": ("N", 4, 8, 8)}, **constants)
    if name == "shapes":
        links = [node("Shape", "x", output="v0")]
        links += [node("Mul", f"v{i}", "one", output=f"v{i + 1}") for i in range(LONG)]
        links.append(node("Reshape", "x", f"v{LONG}", output="h"))
        return model([*links, node("Conv", "h", "w")], {"x": ("N", 4, 8, 8)}, **constants)
    operator = {"moves": "Identity", "quantization": "QuantizeLinear"}[name]
    links, source = [], "w"
    for index in range(LONG // 2):
        inner = [source, "s"] if operator == "QuantizeLinear" else [source]
        links.append(node(operator, *inner, output=f"q{index}"))
        other = "DequantizeLinear" if operator == "QuantizeLinear" else "Identity"
        source = f"v{index}"
        links.append(node(other, f"q{index}", *inner[1:], output=source))
    return model([*links, node("Conv", "x", source)], {"x": ("N", 4, 8, 8)}, **constants)


@pytest.mark.parametrize("name", ["activations", "shapes", "moves", "quantization"])
def test_walks_along_a_chain_are_linear(name, monkeypatch):
    """Each value is asked for a bounded number of times, however long the chain."""
    from archnet.hardware.onnx_graph import OnnxGraph

    asked = 0
    grid, root = OnnxGraph.grid, OnnxGraph.root

    def counted(read):
        def wrapped(self, name):
            nonlocal asked
            asked += 1
            return read(self, name)

        return wrapped

    monkeypatch.setattr(OnnxGraph, "grid", counted(grid))
    monkeypatch.setattr(OnnxGraph, "root", counted(root))
    assert onnx_cost(long_chain(name)).macs == CONV_MACS
    assert asked < 10 * LONG


def test_functions_that_expand_without_end_are_refused():
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]

    def function(name, inner):
        nodes = [
            helper.make_node(inner, ["a"], ["c"], domain="" if inner == "Relu" else "f"),
            helper.make_node(inner, ["c"], ["b"], domain="" if inner == "Relu" else "f"),
        ]
        return helper.make_function("f", name, ["a"], ["b"], nodes, opsets)

    functions = [function("f0", "Relu"), *(function(f"f{i}", f"f{i - 1}") for i in range(1, 27))]
    call = helper.make_node("f26", ["x"], ["y"], domain="f")
    file = model([call], {"x": ("N", 4)}, rank=2, domains=("f",), functions=functions)
    with pytest.raises(AuditError, match=r"nodes, its functions inlined; at most 100,000 are read"):
        onnx_cost(file)
    call.op_type = "f3"
    file = model([call], {"x": ("N", 4)}, rank=2, domains=("f",), functions=functions[:4])
    assert audit(file).counts == {"activation": 16}
    own = helper.make_function(
        "f", "again", ["a"], ["b"], [helper.make_node("again", ["a"], ["b"], domain="f")], opsets
    )
    call.op_type = "again"
    file = model([call], {"x": ("N", 4)}, rank=2, domains=("f",), functions=[own])
    with pytest.raises(AuditError, match="is no valid ONNX model"):
        onnx_cost(file)


def test_files_and_models_take_shapes_alike(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(detector(), path)
    shapes = {"x": (1, 4, 8, 8)}
    assert onnx_cost(path, shapes).macs == onnx_cost(onnx.load(path), shapes).macs
    assert archnet.audit(path, "rk3588", inputs=shapes).pure
