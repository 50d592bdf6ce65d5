"""How files are written is data of the target, and what tools take wrongly is said."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import archnet
from archnet.compose import compose
from archnet.config import DialectConfig
from archnet.deploy import ExportError, doubts, export, parity, to_integers, to_onnx, verify
from archnet.errors import ConfigError
from archnet.hardware import Target
from archnet.lower import target_of
from archnet.ops import Activation, FullyConnected, Student
from archnet.quant import ActivationLSQ, Recipe, quantize, settle
from test_deploy import chain, network
from test_verify import Network, images, student_of

ROOT = Path(__file__).resolve().parents[1]
# What a runtime needs told on a CPU without VNNI, where 8-bit products saturate otherwise.
EXACT = {"session.x64quantprecision": "1"}


def every_operator(bits: int) -> Student:
    """Each operator and move once, on grids."""
    torch.manual_seed(0)
    net, x = network(), torch.randn(32, 4, 8, 8)
    return quantize(net, Recipe(bits, bits, first_bits=bits, last_bits=bits), calibration=[x])


@cache
def rk3588_student() -> Student:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    student = archnet.convert(Network().eval(), x, "rk3588")
    settle(archnet.quantize(student, Recipe(8, 8), calibration=[x]))
    return student


def read_by(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def run(model: onnx.ModelProto, x: np.ndarray, **entries: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": x})[0]


# The default form ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["qdq", "subbyte"])
@pytest.mark.parametrize("clip", ["always", "needed"])
def test_every_operator_stands_between_dequantize_and_quantize(bits, form, clip):
    for student in (every_operator(bits), student_of(bits, bits)):
        model = to_onnx(student, form, dialect=DialectConfig(clip=clip))
        writers = {name: node for node in model.graph.node for name in node.output}
        readers, results = read_by(model), {item.name for item in model.graph.output}
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip", "Cast"):
                continue
            values = [writers[name] for name in node.input if name in writers]
            assert {value.op_type for value in values} == {"DequantizeLinear"}, node
            behind = [item for name in node.output for item in readers.get(name, [])]
            assert {item.op_type for item in behind} <= {"Clip", "QuantizeLinear"}, node
            assert behind or set(node.output) <= results


@pytest.mark.parametrize("bits", [2, 8])
def test_zero_points_stand_beside_every_scale(bits):
    """Rockchip's toolkit reads the third input of each, ONNX Runtime fuses no Gemm without it."""
    for node in to_onnx(every_operator(bits), "qdq").graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3, node


@pytest.mark.parametrize("form", ["qdq", "subbyte"])
@pytest.mark.parametrize("bits", [(1, 2), (2, 4), (3, 6), (4, 4), (8, 8)])
def test_files_load_with_default_options_and_are_the_golden_model(bits, form):
    student, x = student_of(*bits), images(100)
    golden = to_integers(student)
    options = EXACT if 8 in bits else {}
    found = run(to_onnx(student, form), x, **options)
    assert np.array_equal(np.rint(found / golden.unit(golden.outputs[0])), golden.results(x)[0])


@given(
    bits=st.integers(1, 8),
    share=st.floats(0, 1),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    relu=st.booleans(),
    high=st.one_of(st.none(), st.floats(0, 300, width=32)),
    clip=st.sampled_from(["always", "needed"]),
    form=st.sampled_from(["qdq", "subbyte"]),
)
@settings(max_examples=40, deadline=None)
def test_clips_are_exact_at_every_border(bits, share, scale, relu, high, clip, form):
    """Halves of a step, where rounding goes to even, and their neighbours, on both sides of the
    bounds.
    """
    lowest = -(2 ** (bits - 1)) if bits > 1 else -1
    bounds = (0.0 if relu else -float("inf"), float("inf") if high is None else high * scale)
    net = chain((1,), Activation(*bounds))
    quantizer = ActivationLSQ(bits, round(share * lowest))
    quantizer.set_scale(torch.tensor([scale]))
    net.operator("s0").quantizer = quantizer
    step = float(quantizer.scale.detach())
    halves = np.arange(2 * quantizer.low - 5, 2 * quantizer.high + 6) * np.float32(step / 2)
    halves = np.concatenate([halves, np.float32([bounds[0], bounds[1]])])
    halves = halves[np.isfinite(halves)].astype(np.float32)
    near = [np.nextafter(halves, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([halves, *near])[:, None]
    golden = to_integers(net)
    found = run(to_onnx(net, form, dialect=DialectConfig(clip=clip)), x)
    assert np.array_equal(np.rint(found / step), golden.run(x)[golden.outputs[0]])


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_bounds_inside_a_container_bear_a_cut_fraction(bits):
    """OpenVINO cuts a bound's fraction off, others round it: both give the integer meant."""
    model, found = to_onnx(student_of(bits, bits)), 0
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    readers = read_by(model)
    for node in model.graph.node:
        if node.op_type != "Clip" or "unclipped" in node.output[0]:
            continue
        _, scale, zero = readers[node.output[0]][0].input
        for name in node.input[1:]:
            stored = constants[name] / constants[scale] + constants[zero]
            if stored not in (0, constants[zero], 255):  # the ends, and 0, are exact
                assert 0.2 < stored - np.floor(stored) < 0.3
                found += 1
    assert found


def test_every_node_has_a_zero_point_of_its_own():
    """OpenVINO reshapes one to fit its node, whoever else reads it."""
    graph = to_onnx(every_operator(8)).graph
    nodes = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [node.input[2] for node in nodes if len(node.input) > 2]
    assert len(zeros) == len(set(zeros))


def test_the_form_follows_from_the_student(tmp_path):
    student = student_of(4, 4)
    assert to_onnx(student) == to_onnx(student, "qdq")
    float_student = archnet.convert(Network().eval(), torch.randn(1, 3, 12, 12))
    assert to_onnx(float_student) == to_onnx(float_student, "float")
    assert export(student, tmp_path / "a.onnx").read_bytes() == to_onnx(student).SerializeToString()


def test_attributes_are_written_out():
    wanted = {
        "Conv": {"kernel_shape", "strides", "pads", "dilations", "group"},
        "MaxPool": {"kernel_shape", "strides", "pads", "dilations", "ceil_mode", "storage_order"},
        "Gemm": {"alpha", "beta", "transA", "transB"},
        "Concat": {"axis"},
        "Transpose": {"perm"},
        # Without it OpenCV 5.0 computes results of one feature, (B, 1), wrongly.
        "QuantizeLinear": {"axis"},
    }
    for model in (to_onnx(student_of(4, 4)), to_onnx(every_operator(4))):
        for node in model.graph.node:
            assert wanted.get(node.op_type, set()) <= {item.name for item in node.attribute}
            assert all(node.input), f"{node.name} leaves an input out"


# Its keys ------------------------------------------------------------------------------------


def test_a_dialect_belongs_to_the_target(tmp_path):
    student = rk3588_student()
    assert target_of(student).dialect == Target.named("rk3588").dialect
    model = to_onnx(student)
    sizes = [item.type.tensor_type.shape.dim[0].dim_value for item in model.graph.input]
    assert (sizes, model.opset_import[0].version) == ([1], 19)
    again = Student.from_spec(copy.deepcopy(student.spec()))
    assert target_of(again).dialect.batch == "one"
    # A student that was saved before there were dialects.
    del again.graph.target["dialect"]
    assert target_of(again).dialect == DialectConfig()


def test_a_file_for_one_input_runs_on_many(tmp_path):
    student = rk3588_student()
    path = export(student, tmp_path / "net.onnx")
    assert parity(student, path, torch.from_numpy(images(5))).mismatches == 0
    (*_, check) = verify(student, images(70), ["qdq"])
    assert (check.inputs, check.changed) == (70, 0)


def test_what_is_asked_for_goes_before_the_target():
    student = rk3588_student()
    model = to_onnx(student, dialect=DialectConfig(opset=17))
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.opset_import[0].version == 17
    model = to_onnx(student, opset=21)
    assert (model.opset_import[0].version, model.ir_version) == (21, 10)
    with pytest.raises(ExportError, match="a dialect cannot be chosen for form=c"):
        export(student_of(4, 4), "net.h", form="c", dialect=DialectConfig())


def test_clips_are_left_out_where_rounding_saturates():
    kinds = {
        clip: [
            n.op_type
            for n in to_onnx(every_operator(8), dialect=DialectConfig(clip=clip)).graph.node
        ]
        for clip in ("always", "needed")
    }
    assert kinds["always"].count("Clip") > kinds["needed"].count("Clip")


def test_biases_may_be_floats():
    student, x = student_of(4, 4), images(50)
    model = to_onnx(student, dialect=DialectConfig(bias="float"))
    stored = {item.name: item for item in model.graph.initializer}
    kinds = {item.data_type for name, item in stored.items() if name.endswith(".bias")}
    assert kinds == {TensorProto.FLOAT}
    golden = to_integers(student)
    found = np.rint(run(model, x) / golden.unit(golden.outputs[0]))
    assert np.array_equal(found, golden.results(x)[0])


@pytest.mark.parametrize("bits", [(2, 4), (8, 8)])
def test_a_result_may_be_on_a_grid_of_what_calibration_saw(bits, tmp_path):
    student = student_of(*bits)
    student.graph.target = replace(
        Target.named("arch5"), dialect=DialectConfig(output="integer")
    ).description()
    ((low, high),) = student.graph.output_ranges
    assert low < 0 < high
    assert Student.from_spec(student.spec()).graph.output_ranges == [(low, high)]
    model = to_onnx(student)
    last = [node.op_type for node in model.graph.node][-4:]
    assert last == ["Gemm", "Clip", "QuantizeLinear", "DequantizeLinear"]
    integers = to_integers(student)
    found = run(model, images(100), **EXACT)
    golden = integers.results(images(100))[0] * integers.unit(integers.outputs[0])
    step = (high - low) / 255
    inside = np.clip(golden, low, high)
    assert np.abs(found - inside).max() < 0.5001 * step
    (*_, check) = verify(student, images(100), ["qdq"])
    assert check.max_steps <= (0 if max(bits) <= 4 else 1)
    # Float students, and those of versions before, have no range: they keep a float result.
    student.graph.output_ranges = []
    assert to_onnx(student).graph.node[-1].op_type == "Gemm"


def test_another_producer_is_said_in_the_metadata():
    model = to_onnx(student_of(4, 4), dialect=DialectConfig(producer="pytorch 2.0.0"))
    assert (model.producer_name, model.producer_version) == ("pytorch", "2.0.0")
    facts = {item.key: item.value for item in model.metadata_props}
    assert facts == {"form": "qdq", "written_by": "archnet"}


def without_nodes_of_sony(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with the quantizers as mct-quantizers defines them, in operators of ONNX."""
    nodes, stored = [], {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}

    def number(name: str, value: object) -> str:
        array = np.asarray(value, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    for node in model.graph.node:
        if node.domain != "mct_quantizers":
            nodes.append(node)
            continue
        about = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        source, (out,), levels = node.input[0], node.output, 2 ** about["num_bits"]
        if node.op_type == "WeightsSymmetricQuantizer":
            values, threshold = stored[source], stored[node.input[1]]
            step = 2 * threshold / np.float32(levels)
            step = step.reshape([-1, *[1] * (values.ndim - 1)])
            number(out, np.rint(values / step).clip(-levels // 2, levels // 2 - 1) * step)
            continue
        low = -levels // 2 if about["signed"] else 0
        step = about["threshold"] / (low + levels)
        ends = number(f"{out}.sony_low", low), number(f"{out}.sony_high", low + levels - 1)
        step = number(f"{out}.sony_step", step)
        nodes += [
            helper.make_node("Div", [source, step], [f"{out}.sony_steps"]),
            helper.make_node("Round", [f"{out}.sony_steps"], [f"{out}.sony_rounded"]),
            helper.make_node("Clip", [f"{out}.sony_rounded", *ends], [f"{out}.sony_held"]),
            helper.make_node("Mul", [f"{out}.sony_held", step], [out]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("bits", [(2, 8), (4, 8), (8, 8), (8, 4)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_files_for_sonys_converter_are_the_golden_model(bits, per_channel):
    torch.manual_seed(0)
    x = torch.randn(16, 4, 8, 8)
    student = quantize(
        network(),
        Recipe(*bits, per_channel=per_channel, act_power_of_two=True, zero_points=False),
        calibration=[x],
    )
    dialect = replace(Target.named("imx500").dialect, batch="open")
    model = to_onnx(student, "mct", dialect=dialect)
    reshapes = [node for node in model.graph.node if node.op_type == "Reshape"]
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert {int(stored[node.input[1]][0]) for node in reshapes} <= {-1, 1}  # the batch is kept
    (low, high), last = student.graph.output_ranges[0], model.graph.node[-1]
    threshold = helper.get_attribute_value(last.attribute[-1])
    assert last.op_type == "ActivationPOTQuantizer"
    assert np.log2(threshold) == np.rint(np.log2(threshold))
    assert threshold / 2 < max(-low, high) <= threshold
    golden_model = to_integers(student)
    (integers,) = golden_model.results(x.numpy())
    golden = integers * golden_model.unit(golden_model.outputs[0])
    found = run(without_nodes_of_sony(model), x.numpy())
    step = threshold / 2 ** (8 - (low < 0))
    assert np.abs(found - golden.clip(-threshold, threshold - step)).max() <= 0.5001 * step


@pytest.mark.parametrize(
    ("options", "bits", "message"),
    [
        ({}, (4, 8), "its scale is no power of two"),
        ({"act_power_of_two": True}, (4, 4), "fit no type of form=mct"),
        ({"act_power_of_two": True, "zero_points": False}, (1, 8), "-1 to 1 fit no type"),
    ],
)
def test_what_sonys_quantizers_do_not_hold_is_one_line(options, bits, message):
    torch.manual_seed(0)
    student = quantize(
        network(), Recipe(*bits, **options), calibration=[torch.randn(16, 4, 8, 8) + 1]
    )
    with pytest.raises(ExportError, match=message):
        to_onnx(student, "mct")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hardware.dialect.batch=two", "hardware.dialect.batch=two is not one of open, one"),
        ("hardware.dialect.opset=9", "hardware.dialect.opset=9 is out of range: 13 to 25"),
        ("hardware.dialect.clips=always", "clip"),
    ],
)
def test_keys_are_checked_before_anything_is_done(override, message):
    with pytest.raises(ConfigError, match=message):
        compose(ROOT / "conf", ["task=mnist5k", override])


# What tools compute wrongly ------------------------------------------------------------------


def test_files_that_a_tool_computes_wrongly_are_known():
    student = student_of(2, 4)
    assert doubts(to_onnx(student)) == doubts(to_onnx(student, "subbyte")) == {}
    assert "clip=always" in doubts(to_onnx(student, dialect=DialectConfig(clip="needed")))["opencv"]
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s"], ["y"]),
        helper.make_node("ReduceMean", ["y"], ["z"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    assert "ReduceMean" in doubts(helper.make_model(graph))["openvino"]
    torch.manual_seed(0)
    one = chain((6,), FullyConnected(6, 1), Activation(), FullyConnected(1, 4))
    one = quantize(one, Recipe(8, 8), calibration=[torch.randn(8, 6)])
    for batch in ("one", "open"):
        said = doubts(to_onnx(one, dialect=DialectConfig(batch=batch)))
        assert "of one number" in said["opencv"]
    weight = helper.make_tensor("w", TensorProto.INT4, [2, 2], [1, 1, 1, 1])
    scale = numpy_helper.from_array(np.float32(1), "s")
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([node], "g", [], [result], [weight, scale])
    assert "2 and 4 bits" in doubts(helper.make_model(graph))["qnn"]
