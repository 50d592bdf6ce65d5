"""Targets, costs counted by hand, and audits of files that anybody may have written."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference
from torch import nn

import archnet
from archnet.compose import check, compose
from archnet.config import OPERATORS, LimitsConfig
from archnet.errors import ConfigError
from archnet.hardware import (
    DATAFLOWS,
    AuditError,
    Layer,
    Product,
    SystolicArray,
    Target,
    audit,
    cycles,
    onnx_cost,
    student_cost,
    teacher_cost,
)
from archnet.lower import TargetError, check_layers, check_memory, deployed
from archnet.ops import (
    Activation,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    MaxPool,
    Reshape,
    Step,
    Student,
    StudentGraph,
)
from archnet.quant import ActivationLSQ, WeightLSQ

# Targets ------------------------------------------------------------------------------------


def test_a_target_comes_from_a_name_a_target_or_a_config():
    arch5 = Target.named("arch5")
    config = SimpleNamespace(**{item.name: getattr(arch5, item.name) for item in fields(Target)})
    config.operators = list(config.operators)
    assert Target.of("arch5") == Target.of(arch5) == Target.of(config) == arch5


def test_the_targets_differ_in_what_they_allow():
    five = set(Target.named("arch5").operators)
    assert not Target.named("arch5_conv").fc_per_position
    assert set(Target.named("arch5_pointwise").operators) == five | {"conv1x1"}
    assert set(Target.named("arch5_matmul").operators) == five | {"matmul", "softmax"}


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(ConfigError, match=r"hardware=arch6.*nearest: arch5"):
        Target.named("arch6")


CHIPS = ("ethos_u55", "ethos_u85", "imx500", "rk3588")


@pytest.mark.parametrize("name", Target.names())
def test_every_target_says_where_its_statements_come_from(name):
    target = Target.named(name)
    assert target.name == name
    assert target.source
    assert set(target.limits) <= set(target.operators)
    assert set(target.operators) <= set(OPERATORS)


@pytest.mark.parametrize("name", CHIPS)
def test_chips_run_what_a_student_is_made_of(name):
    layers = [
        Layer("conv", (3, 3), (2, 2), (1, 1), channels=512, padded=True),
        Layer("maxpool", (2, 2), (2, 2), (1, 1)),
        *(Layer(kind) for kind in ("batchnorm", "fully_connected", "concat")),
    ]
    assert not any(Target.named(name).judge(layer)[1] for layer in layers)


def test_ethos_u55_and_u85_are_two_chips():
    wide = Layer("conv", (11, 11), (4, 4), (1, 1), channels=64, padded=True)
    small, large = Target.named("ethos_u55"), Target.named("ethos_u85")
    assert small.judge(wide) == (
        "conv",
        "stride 4x4 with padding; ethos_u55 takes up to 3",
    )
    assert small.judge(replace(wide, padded=False)) == large.judge(wide) == ("conv", "")
    assert "stride 4x4" in small.judge(replace(wide, groups=64, padded=False))[1]
    assert "div is not" in small.judge(Layer("div"))[1]
    assert not large.judge(Layer("div"))[1]


LIMITED = {
    "kernel": Layer("conv", kernel=(5, 1)),
    "kernel_area": Layer("conv", kernel=(3, 3)),
    "padded_kernel": Layer("conv", kernel=(5, 5), padded=True),
    "stride": Layer("conv", stride=(1, 5)),
    "padded_stride": Layer("conv", stride=(5, 5), dilation=(2, 2)),
    "dilation": Layer("conv", dilation=(5, 5)),
    "groups": Layer("conv", groups=5, channels=10),
    "channels": Layer("conv", channels=5),
    "weight_sum": Layer("conv", weight_sum=5),
}


@pytest.mark.parametrize("limit", [item.name for item in fields(LimitsConfig)])
def test_every_limit_is_obeyed_and_named(limit):
    within = replace(Target.named("rk3588"), limits={"conv": LimitsConfig(**{limit: 9})})
    beyond = replace(within, limits={"conv": LimitsConfig(**{limit: 4})})
    assert within.judge(LIMITED[limit]) == ("conv", "")
    operator, reason = beyond.judge(LIMITED[limit])
    assert operator == "conv"
    assert "rk3588" in reason
    assert "4" in reason


def test_a_key_that_no_target_has_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\noperatrs: [conv]\n")
    monkeypatch.setattr("archnet.hardware.target.files", lambda _: tmp_path)
    with pytest.raises(ConfigError, match=r"hardware=mine: .*operatrs"):
        Target.named("mine")


# A student on a target ----------------------------------------------------------------------


def residual_student():
    """Steps that come from two modules of a teacher."""
    graph = StudentGraph(
        inputs=["x"],
        output="fc",
        steps=[
            Step("conv", ("x",), "stem.conv"),
            Step("pool", ("conv",), "stem.pool"),
            Step("flat", ("pool",), ""),
            Step("fc", ("flat",), "head"),
        ],
        shapes={"x": (3, 8, 8)},
    )
    modules = {
        "conv": Convolution(3, 16, stride=2),
        "pool": MaxPool(),
        "flat": Reshape((64,)),
        "fc": FullyConnected(64, 10),
    }
    result = Student(graph, modules).eval()
    result.measure()
    return result


@pytest.mark.parametrize("name", Target.names())
def test_a_student_of_the_five_operators_fits_every_target(name):
    check_layers(residual_student(), Target.named(name))
    check_memory(residual_student(), Target.named(name))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"conv": {"channels": 8}}, "step conv, from 'stem.conv' in the teacher: 16 channels"),
        ({"maxpool": {"kernel": 1}}, "step pool, from 'stem.pool'.*kernel 2x2"),
        ({"fully_connected": {"channels": 63}}, "step fc, from 'head'.*64 channels.*rk3588 holds"),
    ],
)
def test_a_layer_beyond_a_limit_is_named(limits, message):
    limits = {name: LimitsConfig(**limit) for name, limit in limits.items()}
    with pytest.raises(TargetError, match=message):
        check_layers(residual_student(), replace(Target.named("rk3588"), limits=limits))


def test_what_is_beyond_a_limit_is_written_in_another_way():
    """Padding that goes before a convolution, of a chip that takes no such stride with it."""
    limits = {"conv": LimitsConfig(padded_stride=1)}
    target = replace(Target.named("rk3588"), limits=limits)
    check_layers(residual_student(), target)
    kinds = {
        type(module).__name__ for module in deployed(residual_student(), target).operators.values()
    }
    assert "Pad" in kinds


def test_an_operator_that_the_target_lacks_is_named():
    target = Target.named("rk3588")
    lacking = replace(target, operators=tuple({*target.operators} - {"maxpool"}))
    with pytest.raises(TargetError, match=r"step pool, from 'stem\.pool'.*maxpool2x2 is not"):
        check_layers(residual_student(), lacking)


def test_integer_weights_may_not_add_up_beyond_the_target():
    net = residual_student()
    layer = net.operator("fc")
    layer.weight_quantizer = WeightLSQ(8)
    layer.weight_quantizer.set_scale(torch.tensor([1.0]))
    with torch.no_grad():
        layer.weight.fill_(2)
    limits = {"fully_connected": LimitsConfig(weight_sum=128)}
    target = replace(Target.named("ethos_u55"), limits=limits)
    check_layers(net, target)
    with torch.no_grad():
        layer.weight[3, 5] = -3
    with pytest.raises(TargetError, match=r"from 'head'.*add up to 129; ethos_u55 takes 128"):
        check_layers(net, target)


def test_activations_must_fit_the_memory():
    net = residual_student()
    most = max(step.live_bytes for step in student_cost(net).steps)
    check_memory(net, replace(Target.named("arch5"), memory_bytes=most))
    with pytest.raises(TargetError, match=r"step conv, from 'stem\.conv'.*1,792 bytes.*has 1,791"):
        check_memory(net, replace(Target.named("arch5"), memory_bytes=most - 1))


# Cost ---------------------------------------------------------------------------------------


def student(shape, steps, output=None):
    """A student from (name, module, inputs) on the input "x" of the given shape."""
    graph = StudentGraph(
        inputs=["x"],
        output=output or steps[-1][0],
        steps=[Step(name, tuple(inputs), "") for name, _, inputs in steps],
        shapes={"x": shape},
    )
    result = Student(graph, {name: module for name, module, _ in steps}).eval()
    result.measure()
    return result


def test_cost_of_known_layers():
    net = student(
        (3, 8, 8),
        [
            ("conv", Convolution(3, 16, stride=2), ["x"]),
            ("relu", Activation(low=0), ["conv"]),
            ("bn", BatchNorm(16), ["relu"]),
            ("pool", MaxPool(), ["bn"]),
            ("flat", Reshape((64,)), ["pool"]),
            ("fc", FullyConnected(64, 10), ["flat"]),
        ],
    )
    cost = student_cost(net)
    rows = {row.name: row for row in cost.steps}
    assert rows["conv"].macs == 4 * 4 * 16 * 3 * 9
    assert rows["fc"].macs == 640
    assert cost.macs == rows["conv"].macs + 640
    assert cost.bops == cost.macs * 32 * 32
    assert cost.parameters == (16 * 27 + 16) + 32 + (640 + 10)
    assert cost.weight_bytes == 4 * cost.parameters
    # The input beside the convolution's result, both float.
    assert rows["conv"].live_bytes == 4 * (3 * 64 + 16 * 16)
    # The batch norm reads one buffer of 16x4x4 and writes another.
    assert cost.activation_bytes == rows["bn"].live_bytes == 4 * 2 * 256
    assert json.loads(json.dumps(cost.totals()))["macs"] == cost.macs


def test_cost_counts_a_layer_at_every_position():
    net = student((5, 7, 8), [("fc", FullyConnected(8, 4), ["x"])])
    assert student_cost(net).macs == 5 * 7 * 8 * 4


def test_cost_takes_its_bits_from_the_quantizers():
    signed, unsigned = ActivationLSQ(8, -128), ActivationLSQ(4, 0)
    steps = [
        ("grid", Activation(), ["x"]),
        ("conv", Convolution(2, 4), ["grid"]),
        ("act", Activation(low=0), ["conv"]),
        ("both", Concat(1), ["act", "act"]),
        ("last", Convolution(8, 2), ["both"]),
    ]
    net = student((2, 4, 4), steps)
    net.operator("grid").quantizer, net.operator("act").quantizer = signed, unsigned
    net.operator("conv").weight_quantizer = WeightLSQ(8)
    net.operator("last").weight_quantizer = WeightLSQ(2)
    rows = {row.name: row for row in student_cost(net).steps}
    assert rows["conv"].bops == rows["conv"].macs * 8 * 8
    assert (rows["last"].weight_bits, rows["last"].activation_bits) == (2, 4)
    assert rows["last"].weight_bytes == 8 * 2 * 9 * 2 // 8 + 2 * 4
    # 64 values of 4 bits and 128 of 4 bits.
    assert rows["both"].live_bytes == 32 + 64


def test_memory_holds_a_value_until_its_last_reader():
    steps = [
        ("a", Convolution(1, 1), ["x"]),
        ("b", Convolution(1, 1), ["a"]),
        ("c", Convolution(1, 1), ["b"]),
        ("d", Concat(1), ["a", "c"]),
    ]
    rows = {row.name: row for row in student_cost(student((1, 4, 4), steps)).steps}
    assert [rows[name].live_bytes // 64 for name in "abcd"] == [2, 2, 3, 4]


def test_cost_of_a_teacher_with_any_grouping():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Conv2d(4, 8, 3, padding=1)
            self.depthwise = nn.Conv2d(8, 8, 5, groups=8, bias=False)
            self.grouped = nn.Conv2d(8, 6, 1, groups=2)
            self.attention = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = self.grouped(self.depthwise(self.dense(x)))
            return self.head(self.attention(x.flatten(2).mT).mean(1))

    teacher = Teacher().train()
    cost = teacher_cost(teacher, torch.randn(5, 4, 8, 8), weight_bits=8, act_bits=4)
    attention = 16 * 6 * 6 * 4 + 2 * 16 * 16 * 6 + 2 * 16 * 6 * 12
    expected = 64 * 8 * 36 + 16 * 8 * 25 + 16 * 6 * 4 + attention + 18
    assert cost.macs == expected
    assert cost.bops == expected * 32
    assert cost.weight_bytes == sum(p.numel() for p in teacher.parameters())
    assert all(module.training for module in teacher.modules())


class Residual(nn.Module):
    """A convolution, its batch norm and ReLU, added to the input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)

    def forward(self, x):
        return self.up(x + torch.relu(self.bn(self.conv(x))))


def test_cost_of_a_teacher_module_by_module():
    cost = teacher_cost(Residual(), torch.randn(3, 4, 8, 8), weight_bits=8, act_bits=8)
    rows = {row.name: row for row in cost.steps}
    assert list(rows) == ["conv", "bn", "up"]
    assert rows["conv"].products == (Product(64, 36, 4),)
    assert rows["up"].macs == 64 * 4 * 6 * 4
    assert sum(row.macs for row in cost.steps) == cost.macs
    assert sum(row.weight_bytes for row in cost.steps) == cost.weight_bytes
    assert rows["bn"].parameters == 8
    assert not cost.uncounted
    # The input stays for the addition; batch norm and ReLU write over what they read.
    assert rows["conv"].live_bytes == rows["bn"].live_bytes == 2 * 256
    assert cost.activation_bytes == 256 + 6 * 256


def test_what_no_later_step_reads_takes_no_memory():
    teacher = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1))
    # The pooling also gives indices, which nobody asked for.
    assert teacher_cost(teacher, torch.randn(1, 4, 8, 8)).activation_bytes == 4 * (256 + 64)


def test_a_teacher_that_multiplies_outside_of_modules():
    class Teacher(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    cost = teacher_cost(Teacher(), torch.randn(2, 6, 5))
    (row,) = cost.steps
    assert (row.name, row.macs) == ("", 2 * 6 * 6 * 5) == ("", cost.macs)


# Cycles -------------------------------------------------------------------------------------


def one_layer(bits=8):
    net = student((16, 8, 8), [("conv", Convolution(16, 32), ["x"])])
    (step,) = student_cost(net).steps
    return replace(step, weight_bits=bits, activation_bits=bits)


@pytest.mark.parametrize(
    ("dataflow", "expected"),
    [
        ("output", 4 * 2 * (32 + 16 + 144 - 2)),
        ("weight", 9 * 2 * (32 + 16 + 64 - 2)),
        ("input", 9 * 4 * (32 + 16 + 32 - 2)),
    ],
)
def test_cycles_of_a_known_layer(dataflow, expected):
    assert cycles(one_layer(), SystolicArray(16, 16, dataflow, bandwidth=1e9)) == expected


def test_cycles_are_bound_by_bandwidth_where_it_is_low():
    step = one_layer()
    # Inputs go in twice (two tiles across), weights four times, results come out once.
    moved = 2 * 64 * 144 + 4 * 144 * 32 + 64 * 32
    assert cycles(step, SystolicArray(bandwidth=1)) == moved
    assert cycles(one_layer(bits=4), SystolicArray(bandwidth=1)) == moved // 2
    # Nine tiles deep: eight times 32-bit sums go out and come back.
    weight = 144 * 32 + 2 * 64 * 144 + 2 * 8 * 64 * 32 * 4 + 64 * 32
    assert cycles(step, SystolicArray(dataflow="weight", bandwidth=1)) == weight


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_an_array_is_never_busier_than_it_is_large(dataflow):
    step = one_layer()
    for rows, columns in ((1, 1), (4, 64), (256, 256)):
        taken = cycles(step, SystolicArray(rows, columns, dataflow, bandwidth=1e9))
        assert taken * rows * columns >= step.macs


def test_what_multiplies_nothing_takes_no_cycles():
    net = student((4, 8, 8), [("pool", MaxPool(), ["x"])])
    (step,) = student_cost(net).steps
    assert cycles(step, SystolicArray()) == 0


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"columns": -1}, {"bandwidth": 0}, {"dataflow": "x"}]
)
def test_impossible_arrays(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SystolicArray(**wrong)


# Audit --------------------------------------------------------------------------------------


def model(nodes, shape=("N", 4, 8, 8), **constants):
    """An ONNX model on the input "x" (and "y", alike) whose last node gives the output."""
    output = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "anybody's",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")],
        [onnx.ValueInfoProto(name=output, type=helper.make_tensor_type_proto(1, None))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21)]
    # A valid model states the shape of its output: inferred here.
    return shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets))


def node(operator, *inputs, output="out", **attributes):
    return helper.make_node(operator, inputs, [output], name=f"the {operator}", **attributes)


def weight(*shape):
    return np.zeros(shape, np.float32)


ALLOWED = {
    "conv": ([node("Conv", "x", "w", strides=[2, 2])], {"w": weight(6, 4, 3, 3)}),
    "maxpool": ([node("MaxPool", "x", kernel_shape=[2, 2])], {}),
    "batchnorm": ([node("BatchNormalization", "x", *"swmv")], dict.fromkeys("swmv", weight(4))),
    "matmul with bias": (
        [node("MatMul", "x", "w", output="h"), node("Add", "h", "b")],
        {"w": weight(8, 5), "b": weight(5)},
    ),
    "gemm": (
        [node("Flatten", "x", output="h"), node("Gemm", "h", "w", "b", transB=1)],
        {"w": weight(3, 256), "b": weight(3)},
    ),
    "concat and activations": (
        [
            node("Concat", "x", "y", output="h", axis=1),
            node("Clip", "h", "", "six", output="i"),
            node("QuantizeLinear", "i", "scale", output="j"),
            node("DequantizeLinear", "j", "scale"),
        ],
        {"six": np.float32(6), "scale": np.float32(0.1)},
    ),
    "integer weight, transposed": (
        [
            node("DequantizeLinear", "w", "scale", output="h"),
            node("Transpose", "h", output="i", perm=[1, 0]),
            node("MatMul", "x", "i"),
        ],
        {"w": np.zeros((5, 8), np.int8), "scale": np.float32(0.1)},
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_the_five_operators_are_pure(name):
    nodes, constants = ALLOWED[name]
    result = audit(model(nodes, **constants))
    assert result.pure, result.violations


VIOLATIONS = {
    "1x1, grouped": ([node("Conv", "x", "w", group=2)], {"w": weight(6, 2, 1, 1)}, "conv1x1 is"),
    "5x5": ([node("Conv", "x", "w")], {"w": weight(6, 4, 5, 5)}, "kernel 5x5"),
    "grouped": ([node("Conv", "x", "w", group=2)], {"w": weight(6, 2, 3, 3)}, "2 groups"),
    "dilated": (
        [node("Conv", "x", "w", dilations=[2, 2])],
        {"w": weight(6, 4, 3, 3)},
        "dilations [2, 2]",
    ),
    "strides": (
        [node("Conv", "x", "w", strides=[2, 1])],
        {"w": weight(6, 4, 3, 3)},
        "strides [2, 1]",
    ),
    "weights at run time": ([node("Conv", "x", "y")], {}, "computed at run time"),
    "3x3 pooling": ([node("MaxPool", "x", kernel_shape=[3, 3])], {}, "kernel 3x3"),
    "residual": ([node("Add", "x", "y")], {}, "addition of two activations"),
    "constant added": ([node("Add", "x", "b")], {"b": weight(8)}, "not the bias of a MatMul"),
    "position table": (
        [node("MatMul", "x", "w", output="h"), node("Add", "h", "b")],
        {"w": weight(8, 5), "b": weight(8, 5)},
        "not the bias of a MatMul",
    ),
    "bias too late": (
        [
            node("MatMul", "x", "w", output="h"),
            node("Relu", "h", output="i"),
            node("Add", "i", "b"),
        ],
        {"w": weight(8, 5), "b": weight(5)},
        "not the bias of a MatMul",
    ),
    "softmax": ([node("Softmax", "x")], {}, "softmax is not an operator of arch5"),
    "attention": ([node("MatMul", "x", "y")], {}, "matmul is not an operator of arch5"),
    "weight a position": ([node("MatMul", "x", "w")], {"w": weight(4, 8, 5)}, "differs from"),
    "unknown": ([node("Sigmoid", "x")], {}, "sigmoid is not an operator of arch5"),
    "unheard of": ([node("Det", "x")], {}, "Det is not an operator of arch5"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_everything_else_is_a_violation_that_names_the_node(name):
    nodes, constants, reason = VIOLATIONS[name]
    result = audit(model(nodes, **constants))
    (violation,) = result.violations
    assert not result.pure
    assert violation.node == f"the {violation.operator}" == nodes[-1].name
    assert reason in str(violation)


def test_other_targets_allow_more_or_less():
    pointwise = model([node("Conv", "x", "w")], w=weight(6, 4, 1, 1))
    assert audit(pointwise, "arch5_pointwise").pure
    # A fully connected layer at every position of a map is the same layer.
    assert audit(pointwise, "arch5").pure
    (violation,) = audit(pointwise, "arch5_conv").violations
    assert "conv1x1 is not an operator of arch5_conv" in violation.reason
    attention = model([node("MatMul", "x", "y", output="h"), node("Softmax", "h")])
    assert audit(attention, "arch5_matmul").pure
    nodes, constants = ALLOWED["gemm"]
    assert audit(model(nodes, **constants), "arch5_conv").pure
    nodes, constants = ALLOWED["matmul with bias"]
    (violation,) = audit(model(nodes, **constants), "arch5_conv").violations
    assert "one row for each sample" in violation.reason


def test_positions_moved_into_the_batch_are_still_positions():
    nodes = [node("Reshape", "x", "rows", output="h"), node("MatMul", "h", "w")]
    file = model(nodes, rows=np.array([-1, 8]), w=weight(8, 5))
    assert audit(file, "arch5").pure
    assert not audit(file, "arch5_conv").pure


def test_wide_maps_are_a_violation_where_the_target_has_a_limit():
    file = model([node("Conv", "x", "w")], w=weight(6, 4, 3, 3))
    assert audit(file, replace(Target.named("arch5"), max_channels=6)).pure
    (violation,) = audit(file, replace(Target.named("arch5"), max_channels=5)).violations
    assert violation.reason == "6 channels; arch5 holds 5"


def test_moves_are_counted_and_listed():
    nodes = [
        node("Slice", "x", "s", "e", output="h"),
        node("Pad", "h", "pads", output="i"),
        node("Conv", "i", "w"),
    ]
    result = audit(
        model(nodes, s=np.array([0]), e=np.array([1]), pads=np.zeros(8, int), w=weight(1, 4, 3, 3))
    )
    assert result.moves == {"Slice": ["the Slice"], "Pad": ["the Pad"]}
    assert result.counts == {"conv3x3": 1}
    assert json.loads(json.dumps(result.summary()))["moves"] == {"Slice": 1, "Pad": 1}


def test_operators_of_other_domains_are_violations():
    foreign = model([node("Conv", "x", "w")], w=weight(6, 4, 3, 3))
    foreign.graph.node[0].domain = "com.chip"
    foreign.opset_import.add(domain="com.chip", version=1)
    (violation,) = audit(foreign).violations
    assert violation.reason == "com.chip.Conv is not an operator of arch5"


def test_a_broken_file_is_a_clear_error(tmp_path):
    good = model(*ALLOWED["conv"][:1], **ALLOWED["conv"][1]).SerializeToString()
    path = tmp_path / "file.onnx"
    generator = np.random.default_rng(0)
    contents = [b"", b"no model at all", good[: len(good) // 2]]
    for _ in range(200):
        broken = bytearray(good)
        broken[generator.integers(len(good))] ^= 1 << int(generator.integers(8))
        contents.append(bytes(broken))
    messages = []
    for content in contents:
        path.write_bytes(content)
        try:
            audit(path)
        except AuditError as error:
            messages.append(str(error))
    assert len(messages) > 3
    assert all(str(path) in message for message in messages)
    for absent in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(AuditError, match=str(absent)):
            audit(absent)


# Anybody's files ----------------------------------------------------------------------------


class Inverted(nn.Module):
    """An inverted residual with squeeze-and-excitation, as in MobileNetV3, and a classifier."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(8, 4, 1)
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(4, 3))

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = x + self.project(y * self.gate(y))
        return self.head(y.mean((2, 3)))


def exported(net, path, dynamic=False, **options):
    """What torch's own exporter makes of a network on (1, 4, 8, 8)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            torch.randn(1, 4, 8, 8),
            path,
            dynamo=False,
            input_names=["x"],
            opset_version=17,
            dynamic_axes={"x": {0: "N"}} if dynamic else None,
            **options,
        )
    return path


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_file_of_torchs_own_exporter(tmp_path, dynamic):
    path = exported(Inverted(), tmp_path / "net.onnx", dynamic)
    wrong = {operator for operator, _ in audit(path).groups()}
    assert wrong >= {"Conv", "Add", "Mul", "HardSwish", "HardSigmoid", "ReduceMean"}
    assert audit(path, "rk3588").pure
    # Of the gate's hardsigmoid Vela's report says nothing: one node, named.
    assert audit(path, "ethos_u55").pure
    (finding,) = audit(path, "ethos_u55").not_judged
    assert finding.operator == "HardSigmoid"
    assert finding.node.startswith("/gate")
    assert "types and scales of ethos_u55 are not judged" in audit(path, "ethos_u55").notes[0]


def test_dropout_and_batch_norm_as_they_run():
    constants = {"ratio": np.float32(0.5), "off": np.False_, "on": np.True_}
    dropped = [node("Dropout", "x", "ratio", "off")]
    assert audit(model(dropped, **constants)).moves == {"Dropout": ["the Dropout"]}
    assert audit(model([node("Dropout", "x")])).pure
    (violation,) = audit(model([node("Dropout", "x", "ratio", "on")], **constants)).violations
    assert "training mode" in violation.reason


def reshaped_by_shape(size):
    """(N, 4, H, W) flattened to (N, ...) by arithmetic on its own shape."""
    nodes = [
        node("Shape", "x", output="shape"),
        node("Gather", "shape", "zero", output="batch"),
        node("Concat", "batch", "rest", output="sizes", axis=0),
        node("Reshape", "x", "sizes"),
    ]
    return model(
        nodes,
        ("N", 4, size, 8),
        zero=np.array([0], dtype=np.int64),
        rest=np.array([-1], dtype=np.int64),
    )


def test_arithmetic_on_known_shapes_is_folded():
    result = audit(reshaped_by_shape(8))
    assert result.pure, result.violations
    assert result.moves == {"Reshape": ["the Reshape"]}
    assert not result.counts


def test_shapes_that_only_a_run_knows_are_not_waved_through():
    result = audit(reshaped_by_shape("H"))
    assert [v.operator for v in result.violations] == ["Shape", "Reshape"]
    assert "export with these" in result.notes[0]
    by_data = [
        node("NonZero", "x", output="found"),
        node("Shape", "found", output="sizes"),
        node("Reshape", "x", "sizes"),
    ]
    violations = audit(model(by_data)).violations
    assert [v.operator for v in violations] == ["NonZero", "Shape", "Reshape"]


def test_what_constants_make_is_a_constant():
    nodes = [
        node("Mul", "w", "two", output="twice"),
        node("Conv", "x", "twice"),
    ]
    file = model(nodes, w=weight(6, 4, 3, 3), two=np.float32(2))
    assert audit(file).counts == {"conv3x3": 1}
    assert onnx_cost(file).weight_bytes == 4 * 6 * 4 * 9
    drawn = [node("RandomNormalLike", "w", output="drawn"), node("Conv", "x", "drawn")]
    assert not audit(model(drawn, w=weight(6, 4, 3, 3))).pure


def test_a_look_up_is_no_move():
    rows = np.array([2, 0])
    assert audit(model([node("Gather", "x", "rows", axis=1)], rows=rows)).moves
    looked_up = [
        node("Cast", "x", output="i", to=TensorProto.INT64),
        node("Gather", "table", "i"),
    ]
    found = audit(model(looked_up, table=weight(5, 3))).violations
    assert found[-1].reason == "gather is not an operator of arch5"


class Calibration:
    """One batch for ONNX Runtime's quantizer."""

    def __init__(self):
        self.batches = iter([{"x": np.random.default_rng(0).normal(size=(1, 4, 8, 8))}])

    def get_next(self):
        batch = next(self.batches, None)
        return batch and {name: values.astype(np.float32) for name, values in batch.items()}


def quantized(folder, act_type="QUInt8", weight_type="QInt8", per_channel=False):
    """What ONNX Runtime's quantizer makes of a small network, in QDQ format."""
    from onnxruntime import quantization

    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    path = exported(net, folder / "float.onnx")
    quantization.quantize_static(
        path,
        folder / "int.onnx",
        Calibration(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=getattr(quantization.QuantType, act_type),
        weight_type=getattr(quantization.QuantType, weight_type),
    )
    return folder / "int.onnx"


def test_a_file_of_onnx_runtimes_quantizer(tmp_path):
    path = quantized(tmp_path, per_channel=True)
    for name in ("arch5", "ethos_u55", "ethos_u85", "rk3588"):
        result = audit(path, name)
        assert result.pure, result.violations
        assert not result.notes
    groups = audit(path, "imx500").groups()
    assert [operator for operator, _ in groups] == ["QuantizeLinear"]
    assert "not a power of two" in next(iter(groups))[1]
    coarse = replace(Target.named("rk3588"), weight_scales=("per_tensor",))
    assert "scales of weights per_channel" in audit(path, coarse).violations[0].reason


def test_types_and_widths_of_a_file_must_be_the_targets(tmp_path):
    path = quantized(tmp_path, act_type="QInt16")
    assert audit(path, "ethos_u55").pure
    reasons = {violation.reason for violation in audit(path, "rk3588").violations}
    assert reasons == {"w8a16; rk3588 has w8a8, w16a16"}
    path = quantized(tmp_path, act_type="QUInt8", weight_type="QUInt8")
    assert audit(path, "ethos_u55").pure
    reasons = {violation.reason for violation in audit(path, "imx500").violations}
    assert "weights in uint8; imx500 stores int2, int4, int8" in reasons
    narrow = replace(Target.named("ethos_u55"), act_types=("int8",))
    reasons = {violation.reason for violation in audit(path, narrow).violations}
    assert reasons == {"activations in uint8; ethos_u55 stores int8"}


def test_integer_weights_of_a_file_are_added_up():
    nodes = [
        node("DequantizeLinear", "w", "scale", output="f"),
        node("Conv", "x", "f"),
    ]
    weights = np.ones((6, 4, 3, 3), np.int8)
    weights[2] = -3
    file = model(nodes, w=weights, scale=np.float32(0.1))
    limits = {"conv": LimitsConfig(weight_sum=107)}
    (violation,) = audit(file, replace(Target.named("ethos_u55"), limits=limits)).violations
    assert violation.reason == "magnitudes of weights add up to 108; ethos_u55 takes 107"


def test_findings_are_grouped_by_operator_and_reason():
    nodes = [node("Sigmoid", "x", output="h"), node("Sigmoid", "h", output="i"), node("Tanh", "i")]
    nodes[0].name = "first"
    groups = audit(model(nodes)).groups()
    assert list(groups.values()) == [["first", "the Sigmoid"], ["the Tanh"]]


# Cost of a file -----------------------------------------------------------------------------


def test_a_file_costs_what_its_student_costs(tmp_path):
    steps = [
        ("conv", Convolution(4, 8, stride=2), ["x"]),
        ("relu", Activation(low=0), ["conv"]),
        ("pool", MaxPool(), ["relu"]),
        ("flat", Reshape((32,)), ["pool"]),
        ("fc", FullyConnected(32, 10), ["flat"]),
    ]
    net = student((4, 8, 8), steps)
    path = tmp_path / "net.onnx"
    archnet.export(net, path)
    expected, found = student_cost(net), onnx_cost(path)
    assert found.totals() == expected.totals()
    by_name = {step.name: step for step in expected.steps}
    assert found.steps[0].products == by_name["conv"].products
    assert found.uncounted == {"MaxPool": 1}


def test_the_widths_of_a_file_are_those_it_stores():
    nodes = [
        node("QuantizeLinear", "x", "scale", "zero", output="q"),
        node("DequantizeLinear", "q", "scale", "zero", output="f"),
        node("DequantizeLinear", "w", "scale", output="wf"),
        node("Conv", "f", "wf", "b"),
    ]
    constants = {
        "scale": np.float32(0.1),
        "zero": np.uint8(0),
        "w": np.zeros((6, 4, 3, 3), np.int8),
        "b": weight(6),
    }
    cost = onnx_cost(model(nodes, **constants))
    (row,) = cost.steps
    assert (row.weight_bits, row.activation_bits) == (8, 8)
    assert row.macs == 36 * 6 * 36
    assert row.bops == row.macs * 64
    assert row.weight_bytes == 216 + 4 + 24
    assert row.live_bytes == 256 + 4 * 216  # bytes read, floats written
    packed = model(nodes, **constants)
    item = packed.graph.initializer[2]
    item.CopyFrom(helper.make_tensor("w", TensorProto.INT4, (6, 4, 3, 3), [1] * 216))
    (row,) = onnx_cost(packed).steps
    assert (row.weight_bits, row.weight_bytes) == (4, 108 + 4 + 24)


def test_products_of_any_operands():
    attention = [node("MatMul", "x", "y", output="h"), node("MatMul", "h", "w")]
    cost = onnx_cost(model(attention, w=weight(8, 5)))
    assert [step.products[0] for step in cost.steps] == [Product(8, 8, 8, 4), Product(32, 8, 5)]
    grouped = onnx_cost(model([node("Conv", "x", "w", group=2)], w=weight(6, 2, 3, 3)))
    assert grouped.steps[0].products == (Product(36, 18, 3, 2),)


def test_what_is_not_counted_is_listed():
    nodes = [node("Sigmoid", "x", output="h"), node("Mul", "h", "y", output="i"), node("Relu", "i")]
    nodes.append(node("Sigmoid", "out", output="z"))
    cost = onnx_cost(model(nodes))
    assert cost.macs == 0
    assert cost.uncounted == {"Sigmoid": 2, "Mul": 1}


def test_a_broken_file_has_a_cost_or_a_clear_error(tmp_path):
    path, generator = tmp_path / "net.onnx", np.random.default_rng(0)
    refused = 0
    for nodes, constants in ALLOWED.values():
        good = model(nodes, **constants).SerializeToString()
        for _ in range(40):
            broken = bytearray(good)
            broken[generator.integers(len(good))] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(broken))
            try:
                onnx_cost(path)
            except AuditError as error:
                refused += "no valid ONNX model" in str(error)
    assert refused > 20


# Targets of anybody's files ---------------------------------------------------------------------

OWN = "name: mychip\noperators: [conv3x3, fully_connected]\nmax_channels: 24\n"


def test_a_target_can_stand_anywhere(tmp_path):
    path = tmp_path / "my chip.yaml"
    path.write_text(OWN)
    target = Target.of(str(path))
    assert (target.name, target.operators, target.max_channels) == (
        "mychip",
        ("conv3x3", "fully_connected"),
        24,
    )
    (tmp_path / "other.yml").write_text("operators: [conv]")
    assert Target.named(str(tmp_path / "other.yml")).name == "other"
    assert not archnet.audit(residual_student(), str(path)).pure


@pytest.mark.parametrize("words", [["hardware={}"], ["-m", "hardware={},arch5"]])
def test_a_run_takes_a_target_of_any_file(tmp_path, words):
    path = tmp_path / "mychip.yaml"
    path.write_text(OWN)
    conf = Path(__file__).resolve().parents[1] / "conf"
    words = [word.format(path) for word in words]
    given = check(conf, words)
    assert not any(str(path) in word for word in given)
    if "-m" not in words:
        hardware = compose(conf, words).hardware
        assert (hardware.name, hardware.max_channels) == ("mychip", 24)
        assert compose(conf, [*words, "hardware.max_channels=8"]).hardware.max_channels == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("oprators: [conv]", "oprators is no key of a target; nearest valid: operators"),
        ("operators: [conv9]", "hardware.operators=conv9 is not known; nearest: conv"),
        ("limits: {mul: {stride: 1}}", "hardware.limits.mul bounds no operator"),
        ("lanes: many", "lanes|many"),
        ("- conv", "holds no keys of a target"),
        ("operators: [", "while parsing"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_describes_no_target_is_one_line(tmp_path, text, said):
    path = tmp_path / "mychip.yaml"
    if text is not None:
        path.write_text(text)
    conf = Path(__file__).resolve().parents[1] / "conf"
    for act in (lambda: Target.of(str(path)), lambda: compose(conf, [f"hardware={path}"])):
        with pytest.raises(ConfigError, match=said) as error:
            act()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
