"""A file gives what the student gives, in float and on integers, and runs as integers."""

import errno
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import archnet
from archnet.deploy import ExportError, export, load_session, parity, to_onnx
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
from archnet.quant import ActivationLSQ, Recipe, WeightLSQ, quantize
from archnet.quant.quantizers import signed_range

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def student(shape, *steps):
    """A student on the input "x"; each step is (name, module, *inputs), its weights random."""
    graph = StudentGraph(
        inputs=["x"],
        outputs=[steps[-1][0]],
        steps=[Step(name, inputs, f"teacher.{name}") for name, _, *inputs in steps],
        shapes={"x": shape},
        classes=[1],
    )
    result = Student(graph, {name: module for name, module, *_ in steps}).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.normal_(0, 0.5)
    result.measure()
    return result


def chain(shape, *modules):
    names = ["x", *(f"s{index}" for index in range(len(modules)))]
    steps = zip(names[1:], modules, names, strict=False)
    return student(shape, *steps)


def network():
    """Every operator and move once, ReLU6 and unbounded activations, FC at every position."""
    return student(
        (4, 8, 8),
        ("stem", Convolution(4, 8, stride=2), "x"),
        ("relu6", Activation(0, 6), "stem"),
        ("pool", MaxPool(1, (1, 0, 1, 0)), "relu6"),
        ("bn", BatchNorm(8), "pool"),
        ("conv", Convolution(8, 8), "bn"),
        ("join", Concat(1), "conv", "pool"),
        ("last", Permute(TO_LAST), "join"),
        ("merge", FullyConnected(16, 6), "last"),
        ("relu", Activation(0), "merge"),
        ("first", Permute(TO_FIRST), "relu"),
        ("slice", Slice(1, 1, 5), "first"),
        ("pad", Pad(((0, 0), (1, 0), (0, 1))), "slice"),
        ("valid", Convolution(4, 4, padding=0), "pad"),
        ("flat", Reshape((36,)), "valid"),
        ("head", FullyConnected(36, 10), "flat"),
    )


def run(path, x):
    session = load_session(path, threads=1)
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def operators(model):
    return [node.op_type for node in model.graph.node]


# Float --------------------------------------------------------------------------------------

CASES = {
    "conv": ((3, 8, 9), Convolution(3, 5)),
    "conv, stride 2": ((3, 8, 9), Convolution(3, 5, stride=2)),
    "conv, unpadded": ((3, 8, 9), Convolution(3, 5, padding=0)),
    "classifier": ((7,), FullyConnected(7, 3)),
    "fc at positions": ((4, 5, 7), FullyConnected(7, 3)),
    "fc on tokens": ((5, 7), FullyConnected(7, 3)),
    "batch norm": ((4, 5, 5), BatchNorm(4, eps=0.1)),
    "max-pooling": ((2, 6, 6), MaxPool()),
    "padded max-pooling": ((2, 5, 6), MaxPool(1, (1, 0, 0, 1))),
    "relu": ((9,), Activation(0)),
    "clip": ((9,), Activation(-0.5, 0.7)),
    "clip above": ((9,), Activation(high=0.7)),
    "nothing": ((9,), Activation()),
    "permute": ((2, 3, 4), Permute(TO_LAST)),
    "reshape": ((2, 3, 4), Reshape((6, 4))),
    "slice": ((6, 4), Slice(1, 1, 6, 2)),
    "pad": ((2, 3, 4), Pad(((0, 1), (2, 0), (1, 1)))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_operator_in_float(name, tmp_path):
    shape, module = CASES[name]
    net, x = chain(shape, module), torch.randn(3, *shape)
    path = export(net, tmp_path / "net.onnx")
    torch.testing.assert_close(run(path, x), net(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [13, 21, 25])
def test_a_network_in_float_with_any_batch(opset, tmp_path):
    net = network()
    path = export(net, tmp_path / "net.onnx", opset=opset)
    for batch in (1, 5):
        x = torch.randn(batch, 4, 8, 8)
        torch.testing.assert_close(run(path, x), net(x).detach(), rtol=1e-5, atol=1e-5)
    assert archnet.audit(path).pure


def test_names_and_origins_are_kept():
    model = to_onnx(network())
    origins = {
        node.name: {item.key: item.value for item in node.metadata_props}
        for node in model.graph.node
    }
    assert {"stem", "relu6", "pool", "bn", "conv", "join", "slice", "pad", "head"} <= set(origins)
    assert origins["stem"] == {"origin": "teacher.stem"}


def test_moves_that_cancel_are_not_written():
    net = chain(
        (4, 5, 5),
        Permute(TO_LAST),
        FullyConnected(4, 6),
        Activation(0),
        Permute(TO_FIRST),
        Permute(TO_LAST),
        FullyConnected(6, 2),
    )
    layer = ["MatMul", "Add"]
    assert operators(to_onnx(net)) == ["Transpose", *layer, "Relu", *layer]


# Integers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_give_what_the_student_gives(bits, per_channel, tmp_path):
    net, x = network(), torch.randn(64, 4, 8, 8)
    quantize(
        net,
        Recipe(bits, bits, first_bits=bits, last_bits=bits, per_channel=per_channel),
        calibration=[x],
    )
    path = export(net, tmp_path / "net.onnx", form="qdq")
    differs = (run(path, x) - net(x).detach()).abs() > 1e-4
    # A value half-way between two integers may be rounded to either.
    assert differs.float().mean() < 0.02
    assert archnet.audit(path).pure


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_lowest_level(bits, share, tmp_path):
    net = chain((50,), Activation(high=1.0))
    quantizer = ActivationLSQ(bits, math.floor(share * signed_range(bits)[0]))
    quantizer.set_scale(torch.tensor([0.3]))
    net.operator("s0").quantizer = quantizer
    path = export(net, tmp_path / "net.onnx", form="qdq")
    x = torch.randn(20, 50) * 20
    torch.testing.assert_close(run(path, x), net(x).detach())


@pytest.mark.parametrize("form", ["qdq", "subbyte"])
def test_the_runtime_fuses_everything_to_integer_kernels(form, tmp_path):
    steps = [
        ("stem", Convolution(4, 8), "x"),
        ("relu", Activation(0, 6), "stem"),
        ("conv", Convolution(8, 8), "relu"),
        ("pool", MaxPool(), "conv"),
        ("other", Convolution(8, 8, stride=2), "relu"),
        ("join", Concat(1), "pool", "other"),
        ("last", Permute(TO_LAST), "join"),
        ("merge", FullyConnected(16, 8), "last"),
        ("flat", Reshape((128,)), "merge"),
        ("head", FullyConnected(128, 10), "flat"),
    ]
    net = student((4, 8, 8), *steps)
    # Below 8 bits the Clip to the width stands between a layer and its rounding.
    quantize(net, Recipe(2, 8), calibration=[torch.randn(32, 4, 8, 8)])
    path = export(net, tmp_path / "net.onnx", form=form)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kernels = operators(onnx.load(tmp_path / "optimized.onnx"))
    assert kernels.count("QLinearConv") == 3
    assert kernels.count("QGemm") == 2
    assert not {"Conv", "Gemm", "MatMul", "MaxPool", "DequantizeLinear"} & set(kernels)


def test_no_float_weight_is_in_the_file(tmp_path):
    net = chain(
        (4, 8, 8), Convolution(4, 8), Activation(0), Reshape((512,)), FullyConnected(512, 3)
    )
    quantize(net, Recipe(3, 6, first_bits=3, last_bits=5), calibration=[torch.randn(8, 4, 8, 8)])
    model = onnx.load(export(net, tmp_path / "net.onnx", form="qdq"))
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert {stored[f"{name}.weight"].dtype for name in ("s0", "s3")} == {np.dtype(np.int8)}
    assert {stored[f"{name}.bias"].dtype for name in ("s0", "s3")} == {np.dtype(np.int32)}
    assert np.abs(stored["s0.weight"]).max() <= 4
    floats = {name for name, array in stored.items() if array.dtype == np.float32}
    assert all(name.endswith((".scale", ".low", ".high")) for name in floats)


def test_only_joined_values_on_one_grid_stay_integers():
    steps = [("a", Activation(), "x"), ("b", Activation(), "x"), ("join", Concat(1), "a", "b")]
    net = student((2, 4, 4), *steps)
    a, b = ActivationLSQ(4, 0), ActivationLSQ(4, 0)
    net.operator("a").quantizer, net.operator("b").quantizer = a, b
    ends = ["DequantizeLinear", "Concat", "QuantizeLinear", "DequantizeLinear"]
    assert operators(to_onnx(net, "qdq"))[-4:] == ends
    b.set_scale(torch.tensor([0.5]))
    assert operators(to_onnx(net, "qdq"))[-1] == "Concat"


def test_layers_without_quantizers_stay_float(tmp_path):
    net = chain((4, 8, 8), Convolution(4, 8), Activation(0), Convolution(8, 8))
    net.operator("s2").weight_quantizer = WeightLSQ(8)
    net.operator("s2").weight_quantizer.set_scale(torch.tensor([0.02]))
    x = torch.randn(5, 4, 8, 8)
    path = export(net, tmp_path / "net.onnx", form="qdq")
    torch.testing.assert_close(run(path, x), net(x).detach(), rtol=1e-5, atol=1e-5)


# Parity -------------------------------------------------------------------------------------


def test_parity_counts_what_changed(tmp_path):
    net, x = chain((6,), FullyConnected(6, 3)), torch.randn(70, 6)
    path = export(net, tmp_path / "net.onnx")
    net.train()
    result = parity(net, path, x, batch_size=32)
    assert (result.mismatches, result.count) == (0, 70)
    assert result.max_abs_diff < 1e-5
    assert result.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert net.training
    before = net(x).argmax(1)
    with torch.no_grad():
        net.operator("s0").bias[0] += 1
    changed = parity(net, path, x)
    assert changed.mismatches == int((net(x).argmax(1) != before).sum()) > 0
    assert changed.max_abs_diff == pytest.approx(1, rel=1e-4)


def test_parity_takes_a_tie_for_no_change(tmp_path):
    net = chain((4,), FullyConnected(4, 2))
    with torch.no_grad():
        net.operator("s0").weight[1] = net.operator("s0").weight[0]
        net.operator("s0").bias.fill_(0)
    path = export(net, tmp_path / "net.onnx")
    with torch.no_grad():
        net.operator("s0").bias[1] += 1e-7
    assert parity(net, path, torch.randn(50, 4)).mismatches == 0


def test_parity_does_not_hide_what_is_not_a_number(tmp_path):
    net = chain((4,), FullyConnected(4, 2))
    path = export(net, tmp_path / "net.onnx")
    with torch.no_grad():
        net.operator("s0").bias.fill_(math.nan)
    result = parity(net, path, torch.randn(3, 4))
    assert math.isnan(result.max_abs_diff)
    assert result.mismatches == 3


# Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "qcqd"}, "form=qcqd is not one of float, qdq, .*; nearest: qdq"),
        ({"opset": 28}, "opset=28 is out of range: 13 to 25"),
    ],
)
def test_impossible_arguments(arguments, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(network(), tmp_path / "net.onnx", **arguments)


def test_only_students_are_exported(tmp_path):
    with pytest.raises(ExportError, match=r"a Linear is not a student: call convert\(\)"):
        export(nn.Linear(2, 2), tmp_path / "net.onnx")


def test_a_quantized_student_has_no_float_form(tmp_path):
    net = network()
    quantize(net, Recipe(4, 4), calibration=[torch.randn(8, 4, 8, 8)])
    with pytest.raises(ExportError, match='export it with form="qdq"'):
        export(net, tmp_path / "net.onnx", form="float")


def test_numbers_that_fit_no_integer_name_the_layer():
    net = chain((4, 8, 8), Convolution(4, 8), Activation(0), Convolution(8, 8))
    quantize(net, Recipe(4, 4), calibration=[torch.randn(8, 4, 8, 8)])
    with torch.no_grad():
        net.operator("s2").bias[0] = 1e12
    with pytest.raises(ExportError, match=r"s2\.bias does not fit int32"):
        to_onnx(net, "qdq")
    with torch.no_grad():
        net.operator("s1").quantizer.log_scale.fill_(math.inf)
    with pytest.raises(ExportError, match="s1 has a scale of inf"):
        to_onnx(net, "qdq")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = export(chain((4,), FullyConnected(4, 2)), tmp_path / "net.onnx")
    before = path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=r"net\.onnx cannot be written \(No space left on device"):
        export(network(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_file_does_not_load(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load .*net\.onnx"):
        load_session(path)
