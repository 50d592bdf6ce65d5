"""Files that are broken on purpose end in one line; what a target does not state is not judged."""

import contextlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import archnet
from archnet.cli import main
from archnet.compose import compose
from archnet.config import ONNX_OPERATORS, OPERATORS
from archnet.deploy import ExportError, load_session, parity
from archnet.errors import ConfigError, printable
from archnet.hardware import AuditError, Target, audit, onnx_cost
from archnet.hardware.onnx_file import MAX_NODES
from archnet.quant import Recipe

ROOT = Path(__file__).resolve().parents[1]
READERS = {"audit": audit, "cost": onnx_cost}


def node(operator, *inputs, output="out", **attributes):
    return helper.make_node(operator, inputs, [output], **attributes)


def model(*nodes, shape=(1, 4, 8, 8), output="out", functions=(), **constants):
    """An ONNX model on the input "x"."""
    graph = helper.make_graph(
        nodes,
        "broken",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


def weight(*shape):
    return np.zeros(shape, np.float32)


def changed(file, change):
    change(file.graph)
    return file


def without(file, field):
    del getattr(file.graph, field)[:]
    return file


def function(name, *nodes):
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["c"], nodes, opsets)


def call(name, source, target):
    return helper.make_node(name, [source], [target], domain="local")


def nested(depth, last):
    """Functions that each call the next one twice."""
    calls = [
        function(f"f{i}", call(f"f{i + 1}", "a", "b"), call(f"f{i + 1}", "b", "c"))
        for i in range(depth)
    ]
    return model(call("f0", "x", "out"), functions=[*calls, function(f"f{depth}", last)])


def typed(file, kind):
    file.graph.input[0].type.tensor_type.elem_type = kind
    return file


def conv(*shape, **attributes):
    return model(node("Conv", "x", "w", **attributes), w=weight(*shape))


def pool(**attributes):
    return model(node("MaxPool", "x", **attributes))


def called_with(parts):
    """A function whose Split takes its number of parts from the call."""
    split = helper.make_node("Split", ["a"], ["c", "d"], axis=1)
    split.attribute.append(onnx.AttributeProto(name="num_outputs", type=2, ref_attr_name="parts"))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    halves = helper.make_function("local", "f", ["a"], ["c"], [split], opsets, ["parts"])
    outer = helper.make_node("f", ["x"], ["out"], domain="local", parts=parts)
    return model(outer, functions=[halves])


RELU = node("Relu", "x")
BROKEN = {
    "weight of one axis": (lambda: conv(3), "Conv out: .*axes of pixels"),
    "weight of two axes": (lambda: conv(6, 4), "Conv out.*axes of pixels"),
    "no group": (lambda: conv(6, 4, 3, 3, group=0), "Conv out has 0 groups"),
    "groups below zero": (lambda: conv(6, 4, 3, 3, group=-2), "has -2 groups"),
    "stride of zero": (lambda: conv(6, 4, 3, 3, strides=[0, 1]), r"strides \[0, 1\]"),
    "a stride too few": (lambda: conv(6, 4, 3, 3, strides=[1]), "axes of pixels"),
    "odd pads": (lambda: conv(6, 4, 3, 3, pads=[1, 1, 1]), r"pads \[1, 1, 1\]"),
    "window of nothing": (lambda: pool(kernel_shape=[0, 2]), r"kernel_shape \[0, 2\]"),
    "window beyond all": (lambda: pool(kernel_shape=[2**62, 2]), "kernel_shape"),
    "element type 29": (lambda: typed(model(RELU), 29), "x has element type 29"),
    "cast to type 29": (lambda: model(node("Cast", "x", to=29)), "to of Cast out.*type 29"),
    "weights of type 29": (
        lambda: changed(conv(6, 4, 3, 3), lambda g: setattr(g.initializer[0], "data_type", 29)),
        "tensor w has element type 29",
    ),
    "size below zero": (lambda: model(RELU, shape=(1, -5, 8, 8)), "x has an axis of size -5"),
    "size beyond all": (lambda: model(RELU, shape=(1, 2**62, 8, 8)), "x is 1x4611.*more elements"),
    "product beyond all": (lambda: model(RELU, shape=(2**30,) * 4), "more elements"),
    "weights of size below zero": (
        lambda: changed(conv(6, 4, 3, 3), lambda g: g.initializer[0].dims.__setitem__(0, -6)),
        "tensor w has an axis of size -6",
    ),
    "weights cut off": (
        lambda: changed(
            conv(6, 4, 3, 3), lambda g: setattr(g.initializer[0], "raw_data", b"\0" * 863)
        ),
        "tensor w holds 863 of 864 bytes",
    ),
    "numbers missing": (
        lambda: changed(
            conv(6, 4, 3, 3),
            lambda g: g.initializer[0].CopyFrom(
                TensorProto(name="w", data_type=1, dims=(6, 4, 3, 3), float_data=[1.0])
            ),
        ),
        "tensor w holds 1 of 216 numbers",
    ),
    "parts that no output takes": (
        lambda: model(helper.make_node("Split", ["x"], ["out", "b"], num_outputs=1)),
        "Split out.*num_outputs 1 and 2 outputs",
    ),
    "more parts than outputs": (
        lambda: model(helper.make_node("Split", ["x"], ["out", "b"], num_outputs=2**40)),
        "num_outputs 1099511627776 and 2",
    ),
    "an output of Split without a name": (
        lambda: model(helper.make_node("Split", ["x"], ["out", ""], num_outputs=2)),
        "output 1 of Split out",
    ),
    "an addend without a name": (
        lambda: model(node("Sum", "x", "", "x")),
        "input 1 of Sum out has no name",
    ),
    "axis beyond all": (
        lambda: model(node("LayerNormalization", "x", "w", axis=2**31), w=weight(8)),
        "LayerNormalization out has axis 2147483648",
    ),
    "axis below all": (lambda: model(node("Softmax", "x", axis=-(2**63))), "Softmax out has axis"),
    "an order beyond all": (
        lambda: model(node("Transpose", "x", perm=[0, 1, 2, 2**62])),
        "Transpose out has perm 4611686018427387904",
    ),
    "batch below zero": (
        lambda: model(node("GatherND", "x", "i", batch_dims=-5), i=np.zeros((1, 4), np.int64)),
        "GatherND out has batch_dims -5",
    ),
    "an equation that has no end": (
        lambda: model(node("Einsum", "x", equation=b"\xff\xfe")),
        "Einsum out has equation",
    ),
    "attributes of a call": (lambda: called_with(1), "num_outputs 1 and 2 outputs"),
    "no nodes": (lambda: without(model(RELU), "node"), "no nodes"),
    "no outputs": (lambda: without(model(RELU), "output"), "no outputs"),
    "cycle": (
        lambda: model(node("Relu", "b", output="a"), node("Relu", "a", output="b")),
        "sorted",
    ),
    "missing input": (lambda: model(node("Relu", "nothing")), "nothing"),
    "two of a name": (lambda: model(RELU, RELU), "'out'"),
    "opset of the future": (
        lambda: helper.make_model(model(RELU).graph, opset_imports=[helper.make_opsetid("", 999)]),
        "opset 999.*pip install",
    ),
    "functions that double": (
        lambda: nested(26, node("Relu", "a", output="c")),
        "67,108,864 nodes",
    ),
    "a function that calls itself": (lambda: nested(3, call("f1", "a", "c")), "calls itself"),
    "functions of one name": (
        lambda: model(
            call("f", "x", "out"), functions=[function("f", node("Relu", "a", output="c"))] * 2
        ),
        "same name",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_is_one_line_that_says_what(name, reader, tmp_path):
    make, reason = BROKEN[name]
    path = tmp_path / "file.onnx"
    onnx.save(make(), path)
    for source in (path, make()):
        with pytest.raises(AuditError, match=reason) as caught:
            READERS[reader](source)
        assert "\n" not in str(caught.value)
        assert (str(path) if source is path else "the model") in str(caught.value)


def test_attributes_of_a_call_are_known_once_it_is_inlined():
    assert "Split" in audit(called_with(2)).moves
    window = helper.make_node("MaxPool", ["a"], ["c"])
    window.attribute.append(onnx.AttributeProto(name="kernel_shape", type=7, ref_attr_name="k"))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    pooled = helper.make_function("local", "f", ["a"], ["c"], [window], opsets, ["k"])
    outer = helper.make_node("f", ["x"], ["out"], domain="local", k=[2, 2])
    assert audit(model(outer, functions=[pooled])).counts


@pytest.mark.parametrize("operator", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("axis", [-64, -5, -4, -1, 0, 3, 4, 7, 63])
def test_an_axis_beyond_its_input_does_not_reach_native_code(operator, axis):
    """The native inference would write beside its memory, which is often seen much later."""
    file = model(node(operator, "x", "w", axis=axis), node("Relu", "out", output="y"), output="y")
    file.opset_import[0].version = 23
    file.graph.initializer.append(numpy_helper.from_array(weight(8), "w"))
    calls = []
    original = onnx.shape_inference.infer_node_outputs

    def watched(schema, given, *rest):
        calls.append(given.op_type)
        return original(schema, given, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx.shape_inference, "infer_node_outputs", watched)
        audit(file)
    assert (operator in calls) == (-4 <= axis < 4)


def test_more_nodes_than_are_read_are_refused_before_they_are_made():
    hundred = function("f", *(node("Relu", "a", output=f"r{i}") for i in range(99)), RELU_C)
    calls = [call("f", "x", f"y{i}") for i in range(MAX_NODES // 100 + 1)]
    with pytest.raises(AuditError, match=r"100,100 nodes, .* at most 100,000 are read"):
        audit(model(*calls, output="y0", functions=[hundred]))
    assert audit(model(*calls[:20], output="y0", functions=[hundred])).counts["activation"] == 2000


RELU_C = node("Relu", "a", output="c")


@pytest.mark.parametrize("reader", READERS)
def test_names_that_are_no_text_are_one_line(reader, tmp_path):
    path = tmp_path / "net.onnx"
    for place in ("node", "input", "operator", "constant"):
        names = {key: key if key != place else "NAME" for key in ("node", "input", "constant")}
        operator = "NAME" if place == "operator" else "Mul"
        file = helper.make_graph(
            [
                helper.make_node(
                    operator, [names["input"], names["constant"]], ["out"], names["node"]
                )
            ],
            "broken",
            [helper.make_tensor_value_info(names["input"], 1, [4])],
            [helper.make_tensor_value_info("out", 1, [4])],
            [numpy_helper.from_array(weight(4), names["constant"])],
        )
        content = helper.make_model(file, opset_imports=[helper.make_opsetid("", 21)])
        path.write_bytes(content.SerializeToString().replace(b"NAME", b"\xff\xfe\xfd\xfc"))
        with pytest.raises(AuditError, match="a name in it is no UTF-8"):
            READERS[reader](path)


def test_a_size_of_minus_one_is_an_open_one():
    for first in (-1, "N", 1):
        file = model(node("Conv", "x", "w"), shape=(first, 4, 8, 8), w=weight(6, 4, 3, 3))
        assert audit(file).pure
        assert onnx_cost(file).macs == 36 * 6 * 36


@pytest.mark.parametrize("operator", ["Relu", "Identity"])
def test_a_long_chain_takes_time_in_proportion(operator):
    names = ["x", *(f"v{i}" for i in range(5_000)), "out"]
    file = model(*(node(operator, a, output=b) for a, b in pairwise(names)))
    found = audit(file)
    assert sum(found.counts.values()) + sum(map(len, found.moves.values())) == 5_001


def test_a_long_table_ends_with_the_sum_of_the_rest(tmp_path, capsys):
    names = ["x", *(f"v{i}" for i in range(1_200)), "out"]
    path = tmp_path / "net.onnx"
    onnx.save(model(*(node("Neg", a, output=b) for a, b in pairwise(names))), path)
    assert main(["cost", str(path)]) == 0
    out = capsys.readouterr().out
    assert "201 more" in out
    assert "v999" in out
    assert "v1001" not in out


# Data beside the file -------------------------------------------------------------------------


def beside(folder, **entries):
    """A file whose weights lie in ``w.bin``; entries of its place are replaced."""
    folder.mkdir(exist_ok=True)
    (folder / "w.bin").write_bytes(b"\0" * 864)
    file = conv(6, 4, 3, 3)
    tensor = file.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin", "offset": "0", "length": "864"} | entries).items():
        tensor.external_data.add(key=key, value=value)
    (folder / "net.onnx").write_bytes(file.SerializeToString())
    return folder / "net.onnx"


OUTSIDE = {
    "above": ({"location": "../w.bin"}, "not in its folder"),
    "absolute": ({"location": "/etc/passwd"}, "not in its folder"),
    "nowhere": ({"location": ""}, "not in its folder"),
    "missing": ({"location": "absent.bin"}, "is missing"),
    "a folder": ({"location": "."}, "is missing"),
    "cut off": ({"offset": "1"}, "is cut off"),
    "before its file": ({"offset": "-8"}, "no place"),
    "no number": ({"length": "many"}, "no place"),
    "too short": ({"length": "860"}, "860 of 864 bytes"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", OUTSIDE)
def test_data_beside_a_file_must_be_there_in_full(name, reader, tmp_path):
    entries, reason = OUTSIDE[name]
    assert READERS[reader](beside(tmp_path / "good"))
    (tmp_path / "w.bin").write_bytes(b"\0" * 864)
    with pytest.raises(AuditError, match=reason):
        READERS[reader](beside(tmp_path / "bad", **entries))


def test_data_beside_a_file_is_no_link_out_of_its_folder(tmp_path):
    path = beside(tmp_path / "net")
    (tmp_path / "secret").write_bytes(b"\0" * 864)
    (path.parent / "w.bin").unlink()
    (path.parent / "w.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(AuditError, match="not in its folder"):
        audit(path)


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_no_file(tmp_path, reader):
    os.mkfifo(tmp_path / "net.onnx")
    with pytest.raises(AuditError, match="is no file"):
        READERS[reader](tmp_path / "net.onnx")


# Names in the terminal ------------------------------------------------------------------------

HOSTILE = ("\x1b[2Jgone", "two\nlines", "[red]x[/]", "[/]", "\u202ereversed", "x" * 5000, "\x07")


@given(st.text())
def test_what_is_printed_is_one_line_without_orders(text):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 200
    assert printable(shown) == shown
    if text.isprintable() and len(text) <= 200:
        assert shown == text


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("words", [["audit"], ["audit", "hardware=rk3588"], ["cost"]])
def test_names_of_a_file_are_printed_and_not_obeyed(name, words, tmp_path, capsys):
    path = tmp_path / f"{name[:20]}.onnx"
    path = path if "/" not in name else tmp_path / "net.onnx"
    nodes = [
        helper.make_node("Softmax", ["x"], ["h"], name=name),
        helper.make_node(name, ["h"], ["i"], name=name, domain="com.chip"),
        helper.make_node("Conv", ["i", name], ["out"], name=f"conv{name}"),
    ]
    file = model(*nodes, **{name: weight(6, 4, 3, 3)})
    file.opset_import.add(domain="com.chip", version=1)
    onnx.save(file, path)
    assert main([words[0], str(path), *words[1:]]) in (0, 1)
    streams = capsys.readouterr()
    text = streams.out + streams.err
    assert all(line.isprintable() for line in text.split("\n"))
    assert printable(name)[:4] in text
    path.write_bytes(b"broken")
    assert main([words[0], str(path), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("archnet: ")
    assert error.count("\n") == 1
    assert error[:-1].isprintable()


# What a target does not state -------------------------------------------------------------------

STATED = {
    "Resize": node("Resize", "x", "", "scales", mode="nearest"),
    "GlobalMaxPool": node("GlobalMaxPool", "x"),
    "InstanceNormalization": node("InstanceNormalization", "x", "v", "v"),
    "LSTM": node("LSTM", "s", "lstm", "again", hidden_size=2),
    "GRU": node("GRU", "s", "gru", "again_gru", hidden_size=2),
    "ArgMax": node("ArgMax", "x"),
    "Mish": node("Mish", "x"),
}


def of_operator(operator):
    """A model of one node that rk3588's list of operators names."""
    first = node("Squeeze", "x", "axes", output="t")
    constants = {
        "scales": np.ones(4, np.float32),
        "v": weight(4),
        "axes": np.array([0, 1]),
        "lstm": weight(1, 8, 8),
        "again": weight(1, 8, 2),
        "gru": weight(1, 6, 8),
        "again_gru": weight(1, 6, 2),
        "rows": np.array([8, 1, 8]),
    }
    recurrent = operator in ("LSTM", "GRU")
    before = [first, node("Reshape", "t", "rows", output="s")] if recurrent else []
    shape = (1, 1, 8, 8) if recurrent else (1, 4, 8, 8)
    return model(*before, STATED[operator], shape=shape, **constants)


@pytest.mark.parametrize("operator", STATED)
def test_rk3588_runs_what_its_source_lists(operator):
    found = audit(of_operator(operator), "rk3588")
    assert found.pure, found.violations
    assert not found.not_judged
    assert not audit(of_operator(operator), "arch5").pure
    assert not audit(of_operator(operator), "arch5").not_judged


@pytest.mark.parametrize(
    ("target", "operator", "answer"),
    [
        ("rk3588", "Einsum", "lacks"),
        ("rk3588", "Abs", "runs"),
        ("rk3588", "Floor", "lacks"),
        ("rk3588", "GroupNormalization", "lacks"),
        ("rk3588", "Gelu", "not judged"),
        ("rk3588", "Swish", "not judged"),
        ("ethos_u55", "Round", "lacks"),
        ("ethos_u55", "Neg", "runs"),
        ("ethos_u55", "Mish", "not judged"),
        ("ethos_u85", "Round", "lacks"),
        ("ethos_u85", "ArgMax", "runs"),
        ("ethos_u85", "Erf", "not judged"),
        ("imx500", "Softmax", "runs"),
        ("imx500", "Sigmoid", "runs"),
        ("arch5", "Softmax", "lacks"),
        ("arch5", "NonZero", "lacks"),
    ],
)
def test_an_operator_runs_or_not_or_is_not_judged(target, operator, answer):
    attributes = {"Einsum": {"equation": "abcd->abcd"}, "GroupNormalization": {"num_groups": 2}}
    inputs = ["x", "v", "v"] if operator == "GroupNormalization" else ["x"]
    file = model(node(operator, *inputs, **attributes.get(operator, {})), v=weight(4))
    file.opset_import[0].version = 24
    found = audit(file, target)
    assert found.pure == (answer != "lacks")
    assert [item.operator for item in found.violations] == [operator] * (answer == "lacks")
    assert [item.operator for item in found.not_judged] == [operator] * (answer == "not judged")
    assert found.summary()["not_judged"] == ({operator: 1} if answer == "not judged" else {})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: model(node("Conv", "x", "w"), shape=(1, 4, 8), w=weight(6, 4, 3)), "conv1d"),
        (
            lambda: model(node("Conv", "x", "w"), shape=(1, 4, 8, 8, 8), w=weight(6, 4, 3, 3, 3)),
            "conv3d",
        ),
        (
            lambda: model(
                node("ConvTranspose", "x", "w"), shape=(1, 4, 8, 8, 8), w=weight(4, 6, 3, 3, 3)
            ),
            "conv_transpose3d",
        ),
        (
            lambda: model(node("MaxPool", "x", kernel_shape=[2, 2, 2]), shape=(1, 4, 8, 8, 8)),
            "maxpool3d",
        ),
        (lambda: model(node("GlobalAveragePool", "x"), shape=(1, 4, 8)), "averagepool1d"),
    ],
)
def test_windows_on_other_axes_have_names_of_their_own(make, name):
    (violation,) = audit(make(), "arch5").violations
    assert violation.reason == f"{name} is not an operator of arch5"
    (finding,) = audit(make(), "imx500").not_judged
    assert finding.reason == f"{name} is not in the description of imx500"
    if name in Target.named("ethos_u55").lacks:
        assert audit(make(), "ethos_u55").violations


def test_a_pooling_of_all_pixels_is_held_to_the_limits_that_are_known():
    for size, answer in ((8, "runs"), (300, "violation"), ("H", "not judged")):
        found = audit(model(node("GlobalMaxPool", "x"), shape=(1, 4, size, size)), "ethos_u55")
        judged = "violation" if found.violations else "not judged" if found.not_judged else "runs"
        assert judged == answer
    assert audit(model(node("GlobalMaxPool", "x"), shape=(1, 4, "H", "W")), "rk3588").counts


def test_what_no_description_speaks_of_counts_where_a_target_is_told_in_full():
    file = model(node("Conv", "x", "x"))
    (violation,) = audit(file, "arch5").violations
    (finding,) = audit(file, "rk3588").not_judged
    assert violation.reason == finding.reason == "its weight or bias is computed at run time"


def test_the_command_says_what_it_did_not_judge(tmp_path, capsys):
    path = tmp_path / "net.onnx"
    onnx.save(model(node("Gelu", "x", output="h"), node("Gelu", "h")), path)
    assert main(["audit", str(path), "hardware=rk3588"]) == 0
    out = capsys.readouterr().out
    assert "not judged: Gelu: gelu is not in the description of rk3588 (2)" in out
    assert "pure under rk3588 as far as judged: 2 Gelu not judged; 0 nodes outside" in out
    onnx.save(model(node("Gelu", "x", output="h"), node("Floor", "h")), path)
    assert main(["audit", str(path), "hardware=rk3588"]) == 1
    assert "not pure under rk3588: 1 nodes outside" in capsys.readouterr().out


@pytest.mark.parametrize("name", Target.names())
def test_a_description_does_not_contradict_itself(name):
    target = Target.named(name)
    assert target.complete == name.startswith("arch5")
    assert not set(target.operators) & set(target.lacks)
    assert set(target.lacks) <= {*OPERATORS, *ONNX_OPERATORS}


@pytest.mark.parametrize("operator", ONNX_OPERATORS)
def test_an_operator_has_one_name(operator):
    """What is named as in ONNX is asked for by that name."""
    if not onnx.defs.has(operator):
        pytest.skip("this onnx does not know it")
    names = sys.modules["archnet.hardware.audit"].NAMES
    assert operator not in names
    assert operator not in sys.modules["archnet.hardware.audit"]._JUDGES or operator == "Constant"
    assert set(names.values()) <= set(OPERATORS)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("hardware.lacks=[sofmax]", "hardware.lacks=sofmax is not known; nearest: softmax"),
        ("hardware.lacks=[conv3x3]", "either runs it or lacks it"),
    ],
)
def test_what_a_target_lacks_is_checked(key, reason):
    with pytest.raises(ConfigError, match=reason):
        compose(ROOT / "conf", [key])


# Parity ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    result = archnet.convert(network.eval(), torch.randn(1, 3, 6, 6))
    archnet.quantize(result, Recipe(4, 4), calibration=[torch.randn(4, 3, 6, 6)])
    return result.eval()


def test_parity_of_quant_nodes_runs_in_qonnx_or_names_the_extra(student, tmp_path, monkeypatch):
    path = archnet.export(student, tmp_path / "net.onnx", form="qonnx")
    images = torch.randn(3, 3, 6, 6)
    with contextlib.suppress(ImportError):
        import qonnx  # noqa: F401  # type: ignore[import-untyped]

        found = parity(student, path, images)
        assert found.runtime.startswith("qonnx ")
        assert (found.mismatches, found.count) == (0, 3)
    monkeypatch.setattr("archnet.deploy.runtime.missing_extra", lambda name: f"needs {name}")
    with pytest.raises(ExportError, match=r"net\.onnx is of form qonnx, which needs qonnx"):
        parity(student, path, images)


def test_parity_of_another_file_is_one_line(student, tmp_path):
    path = tmp_path / "net.onnx"
    images = torch.randn(3, 3, 6, 6)
    file = model(node("Cast", "x", to=TensorProto.STRING), shape=("N", 3, 6, 6))
    file.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    onnx.save(file, path)
    with pytest.raises(ExportError, match=r"net\.onnx gives"):
        parity(student, path, images)
    onnx.save(nested(26, node("Relu", "a", output="c")), path)
    with pytest.raises(ExportError, match="67,108,864 nodes"):
        parity(student, path, images)
    path.write_bytes(b"broken")
    with pytest.raises(ExportError, match=r"net\.onnx"):
        parity(student, path, images)
    with pytest.raises(ExportError, match="absent"):
        parity(student, tmp_path / "absent.onnx", images)


@pytest.mark.parametrize("beside_it", [False, True])
def test_a_name_left_out_at_the_end_is_run(student, tmp_path, beside_it):
    """ONNX allows it; optimizers of the runtime read what is not there."""
    path = tmp_path / "net.onnx"
    file = model(
        node("LayerNormalization", "x", "w", "", axis=-1), shape=("N", 3, 6, 6), w=weight(6)
    )
    onnx.save(file, path, save_as_external_data=beside_it, location="w.bin", size_threshold=0)
    with pytest.raises(ExportError, match=r"net\.onnx gives \(3, 3, 6, 6\)"):
        parity(student, path, torch.randn(3, 3, 6, 6))


@pytest.mark.parametrize(
    "name", ["parts that no output takes", "batch below zero", "axis below all"]
)
def test_what_the_runtime_does_not_survive_never_reaches_it(student, tmp_path, name):
    make, reason = BROKEN[name]
    path = tmp_path / "net.onnx"
    onnx.save(make(), path)
    for run in (load_session, lambda path: parity(student, path, torch.randn(3, 4, 8, 8))):
        with pytest.raises(ExportError, match=f"net.onnx.*{reason}"):
            run(path)


# Mutations ------------------------------------------------------------------------------------


def test_mutated_files_end_in_an_answer_or_one_line():
    """A few; ``benchmarks/fuzz_onnx.py --count 10000`` has them all."""
    command = [sys.executable, ROOT / "benchmarks" / "fuzz_onnx.py", "--count", "80"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "traceback: 0, hang: 0, crash: 0, memory: 0, executed: 0, output: 0" in ended.stdout
