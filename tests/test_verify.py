"""Every form of a student computes what its golden model computes, and says where it does not."""

import copy
import importlib.util
import json
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import nn

import archnet
from archnet.cli import main
from archnet.deploy import FORMS, Check, ExportError, export, load_session, parity, to_onnx, verify
from archnet.deploy.verify import RUNNABLE
from archnet.errors import ArchnetError
from archnet.jobs import conductor
from archnet.ops import Student
from archnet.quant import ActivationLSQ, Recipe, WeightLSQ, settle
from archnet.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]
MODULE = sys.modules["archnet.deploy.verify"]  # a name that the function of the module hides
INTEGER_FORMS = [name for name, form in FORMS.items() if form.integers]


class Network(nn.Module):
    """Stride, batch norm, ReLU6, a residual, a concatenation, poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 3, 1, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(13, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = torch.relu(x + self.left(x))
        x = torch.cat([x, self.right(x)], 1)
        return self.head(self.pool(x).mean((2, 3)))


def student_of(weight_bits: int, act_bits: int, **options) -> Student:
    """An untrained student, quantized and settled; the caller's own."""
    return copy.deepcopy(_student_of(weight_bits, act_bits, **options))


@cache
def _student_of(weight_bits: int, act_bits: int, **options) -> Student:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 12, 12)
    student = archnet.convert(Network().eval(), images[:1])
    archnet.quantize(student, Recipe(weight_bits, act_bits), calibration=[images], **options)
    settle(student)
    return student.eval()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 12, 12), np.float32)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# Agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (2, 4), (3, 6), (4, 4), (5, 7), (8, 2), (8, 8)])
def test_pytorch_and_onnxruntime_agree_with_the_golden_model(bits):
    checks = by_name(verify(student_of(*bits), images(300), ["qdq", "subbyte"]))
    assert list(checks) == ["pytorch float32", "pytorch float64", "qdq", "subbyte"]
    for check in checks.values():
        assert (check.inputs, check.changed) == (300, 0), check
        assert check.max_steps <= (0 if max(bits) <= 4 else 1), check
    assert checks["pytorch float64"].bit_equal == 1
    assert checks["qdq"].runtime == f"onnxruntime {installed_version('onnxruntime')}"


@pytest.mark.parametrize("bits", [(1, 1), (2, 4), (3, 6), (8, 8)])
def test_qonnx_agrees_with_the_golden_model(bits):
    pytest.importorskip("qonnx")
    (*_, check) = verify(student_of(*bits), images(150), ["qonnx"])
    assert (check.name, check.inputs) == ("qonnx", 100)  # it is slow
    assert (check.max_steps, check.bit_equal, check.changed) == (0, 1, 0)


@pytest.mark.parametrize("bits", [(2, 4), (3, 6), (8, 8)])
def test_openvino_agrees_with_the_golden_model(bits, tmp_path):
    pytest.importorskip("openvino")
    student = student_of(*bits)
    check = by_name(verify(student, images(150), ["openvino"]))["openvino in floats"]
    assert (check.max_steps, check.bit_equal, check.changed) == (0, 1, 0)
    qdq = export(student, tmp_path / "a.onnx", form="qdq").read_bytes()
    assert export(student, tmp_path / "b.onnx", form="openvino").read_bytes() == qdq


def test_per_tensor_scales_and_dorefa_agree_too():
    student = student_of(2, 4, per_channel=False, method="dorefa")
    for check in verify(student, images(100), ["qdq", "subbyte"]):
        assert (check.max_steps, check.changed) == (0, 0), check


class Smooth(nn.Module):
    """Values that lie mostly above zero, but not all, into a convolution with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hardswish = nn.functional.hardswish
        x = hardswish(self.second(hardswish(3 * self.first(x))))
        return self.head(self.third(x).mean((2, 3)))


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("sums", [None, 8])
def test_zero_points_agree_with_the_golden_model(bits, sums):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 12, 12)
    student = archnet.convert(Smooth().eval(), x)
    archnet.quantize(student, Recipe(bits, bits, sum_bits=sums or bits), calibration=[x])
    settle(student)
    grids = [m.quantizer for m in student.operators.values() if hasattr(m, "quantizer")]
    assert any(q is not None and -(2 ** (q.bits - 1)) < q.low < 0 for q in grids)
    forms = ["qdq", "subbyte"]
    forms += [form for form in ("qonnx", "openvino") if importlib.util.find_spec(form)]
    for check in verify(student, images(100), forms):
        assert (check.changed, check.max_steps) == (0, 0), check


def test_the_student_stays_as_it_is():
    student = student_of(2, 4).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    verify(student, images(3), [])
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert next(student.parameters()).dtype == torch.float32


# Files --------------------------------------------------------------------------------------


def types(model: onnx.ModelProto, suffix: str) -> set[str]:
    return {
        TensorProto.DataType.Name(item.data_type)
        for item in model.graph.initializer
        if item.name.endswith(suffix)
    }


@pytest.mark.parametrize(
    ("bits", "weights"), [(1, "INT2"), (2, "INT2"), (3, "INT4"), (4, "INT4"), (5, "INT8")]
)
def test_subbyte_takes_the_narrowest_type(bits, weights):
    widths = dict.fromkeys(("first_bits", "last_bits", "sum_bits"), bits)
    model = to_onnx(student_of(bits, bits, **widths), "subbyte")
    onnx.checker.check_model(model, full_check=True)
    assert (model.opset_import[0].version, model.ir_version) == (25, 13)
    # Additions are constants of 2 bits.
    assert types(model, ".weight") == {weights, "INT2"}
    assert types(model, ".bias") == {"INT32"}
    # Of activations the file holds none: they stay in the containers of form qdq.
    assert types(model, "_act.zero") == types(model, "_grid.zero") == {"UINT8"}


def test_weight_bytes_match_the_widths(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)
    )
    bytes_of = {}
    for bits in (2, 4, 8):
        student = archnet.convert(network.eval(), x[:1])
        archnet.quantize(student, Recipe(bits, 4, first_bits=bits, last_bits=bits), calibration=[x])
        bytes_of[bits] = export(student, tmp_path / "net.onnx", form="subbyte").stat().st_size
    assert bytes_of[2] < 0.32 * bytes_of[8]
    assert bytes_of[4] < 0.55 * bytes_of[8]


def test_qdq_files_are_pure_and_open_by_themselves(tmp_path):
    student = student_of(2, 4)
    path = export(student, tmp_path / "net.onnx", form="subbyte")
    assert archnet.audit(path).pure
    result = parity(student, path, torch.from_numpy(images(50)))
    assert result.mismatches == 0
    assert result.max_abs_diff < 1e-4


def test_qonnx_files_hold_quant_nodes_of_the_widths():
    model = to_onnx(student_of(3, 6), "qonnx")
    quants = [node for node in model.graph.node if node.op_type == "Quant"]
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert {node.domain for node in quants} == {"qonnx.custom_op.general"}
    assert {float(stored[node.input[3]]) for node in quants} == {2, 3, 6, 8, 32}


# Differences --------------------------------------------------------------------------------


def test_a_difference_is_traced_to_the_step_it_begins_at(tmp_path):
    student = student_of(4, 4)
    model = to_onnx(student, "qdq")
    (weight,) = [item for item in model.graph.initializer if item.name == "conv2d_2_conv.weight"]
    array = numpy_helper.to_array(weight).copy()
    array[0] += 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    path = tmp_path / "edited.onnx"
    onnx.save(model, path)
    check = by_name(verify(student, images(60), ["qdq"], {"edited.onnx": path}))["edited.onnx"]
    assert check.max_steps > 0
    assert check.bit_equal < 1
    assert check.first is not None
    assert check.first.origin == "right"
    assert check.first.step == "conv2d_2_conv_grid"
    assert 0 < check.first.values <= check.first.total <= 16 * 5 * 6 * 6
    assert "(right): " in str(check.first)
    assert check.summary()["first"]["step"] == check.first.step


def test_the_result_itself_may_be_where_it_begins(tmp_path):
    student = student_of(4, 4)
    model = to_onnx(student, "qdq")
    (bias,) = [item for item in model.graph.initializer if item.name == "linear_fc.bias"]
    array = numpy_helper.to_array(bias).copy()
    array[2] += 10**6
    bias.CopyFrom(numpy_helper.from_array(array, bias.name))
    path = tmp_path / "edited.onnx"
    onnx.save(model, path)
    check = by_name(verify(student, images(60), [], {"edited.onnx": path}))["edited.onnx"]
    assert (check.first.step, check.first.steps) == ("linear_fc", 10**6)
    assert check.changed > 0


def test_what_is_no_number_is_a_difference(monkeypatch):
    student = student_of(4, 4)
    run_session = MODULE.run_session

    def broken(*arguments) -> list[np.ndarray]:
        return [np.nan * array for array in run_session(*arguments)]

    monkeypatch.setattr(MODULE, "run_session", broken)
    (*_, check) = verify(student, images(3), ["qdq"])
    assert check.bit_equal == 0
    assert check.changed == 3
    assert (check.first.step, check.first.steps) == ("x_grid", np.inf)
    assert check.summary()["max_steps"] is None
    json.dumps(check.summary(), allow_nan=False)


# Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("qdqq", "form=qdqq is not one of float, .*; nearest: qdq"),
        ("qcdq", "form=qcdq is called qdq now: form=qdq"),
        ("c", f"form=c is not run here; these are: {', '.join(RUNNABLE)}"),
    ],
)
def test_forms_that_cannot_be_verified(form, message):
    with pytest.raises(ExportError, match=message):
        verify(student_of(2, 4), images(2), [form])


@pytest.mark.parametrize("form", INTEGER_FORMS)
def test_a_float_student_has_no_integer_form(form, tmp_path):
    student = archnet.convert(Network().eval(), torch.randn(1, 3, 12, 12))
    with pytest.raises(ExportError, match=f"no quantizers, and form={form} holds integers"):
        export(student, tmp_path / "net", form=form)
    assert archnet.audit(student).pure


def test_a_float_student_is_not_verified():
    student = archnet.convert(Network().eval(), torch.randn(1, 3, 12, 12))
    with pytest.raises(ExportError, match=r"is float|float weights"):
        verify(student, images(2))


@pytest.mark.parametrize(
    ("opset", "bits", "message"),
    [
        (21, 2, r"conv2d_1_conv\.weight: its 2 bits need int2, which opset=21 lacks"),
        (13, 4, "opset=21"),
    ],
)
def test_an_opset_without_the_type_names_the_layer(opset, bits, message):
    with pytest.raises(ExportError, match=message):
        to_onnx(student_of(bits, 8), "subbyte", opset=opset)


@pytest.mark.parametrize("form", ["qdq", "subbyte"])
def test_a_width_that_no_type_holds_names_the_step(form):
    student = student_of(4, 4)
    student.operator("conv2d_2_conv").weight_quantizer = WeightLSQ(12)
    student.operator("conv2d_2_conv").weight_quantizer.set_scale(torch.tensor([1e-4]))
    with pytest.raises(ExportError, match=r"conv2d_2_conv\.weight.* (int8|form=subbyte)"):
        to_onnx(student, form)
    student = student_of(4, 4)
    student.operator("x_grid").quantizer = ActivationLSQ(12, -2048)
    with pytest.raises(ExportError, match=f"step x_grid: .*-2048 to 2047 .*form={form}"):
        to_onnx(student, form)


@pytest.mark.parametrize("form", ["c", "tflite"])
def test_what_is_no_onnx_takes_no_opset(form, tmp_path):
    with pytest.raises(ExportError, match=f"form={form} is no ONNX model"):
        to_onnx(student_of(2, 4), form)
    with pytest.raises(ExportError, match=f"opset=21 cannot be chosen for form={form}"):
        export(student_of(2, 4), tmp_path / "net", form=form, opset=21)


def test_a_missing_extra_is_one_line(monkeypatch, tmp_path):
    def version(package: str) -> str:
        if package in ("qonnx", "openvino"):
            raise PackageNotFoundError(package)
        return installed_version(package)

    monkeypatch.setattr(MODULE, "version", version)
    monkeypatch.setattr("archnet.deploy.runtime.version", version)
    monkeypatch.setitem(sys.modules, "openvino", None)
    checks = by_name(verify(student_of(2, 4), images(2)))
    assert checks["qonnx"].summary() == {"skipped": "needs the extra: pip install 'archnet[qonnx]'"}
    assert checks["openvino"].skipped == "needs the extra: pip install 'archnet[openvino]'"
    with pytest.raises(ExportError, match=r"pip install 'archnet\[openvino\]'"):
        export(student_of(2, 4), tmp_path / "net.onnx", form="openvino")


# Files that were edited or damaged ------------------------------------------------------------


def test_a_file_of_another_network_is_no_parity(tmp_path):
    student, other = student_of(2, 4), student_of(2, 4)
    model = to_onnx(other, "qdq")
    two_inputs, wrong_size, other_shape = (onnx.ModelProto() for _ in range(3))
    for edited in (two_inputs, wrong_size, other_shape):
        edited.CopyFrom(model)
    two_inputs.graph.input.add().CopyFrom(
        onnx.helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1])
    )
    wrong_size.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    name = other_shape.graph.output[0].name
    other_shape.graph.node.add().CopyFrom(
        onnx.helper.make_node("Concat", [name, name], ["twice"], axis=1)
    )
    other_shape.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_value_info("twice", TensorProto.FLOAT, ["batch", 14])
    )
    x = torch.from_numpy(images(2))
    for edited, message in (
        (two_inputs, "has 2 inputs, a student one"),
        (wrong_size, "cannot (load|run) "),
        (other_shape, r"gives \(2, 14\), the student \(2, 7\)"),
    ):
        path = tmp_path / "net.onnx"
        path.write_bytes(edited.SerializeToString())
        with pytest.raises(ExportError, match=message):
            parity(student, path, x)
        with pytest.raises(ExportError, match=message):
            verify(student, x.numpy(), [], {"net.onnx": path})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Student, Path, dict[str, bytes]]:
    folder, student = tmp_path_factory.mktemp("damaged"), student_of(2, 4)
    content = {
        form: export(student, folder / "net.onnx", form=form).read_bytes()
        for form in ("qdq", "subbyte")
    }
    return student, folder / "net.onnx", content


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(form=st.sampled_from(["qdq", "subbyte"]), data=st.data())
def test_a_damaged_file_is_a_clear_error_or_runs(files, form, data):
    student, path, content = files
    damaged = bytearray(content[form])
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            place = data.draw(st.integers(0, len(damaged) - 1))
            damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged))
    for use in (
        lambda: load_session(path),
        lambda: parity(student, path, torch.from_numpy(images(2))),
        lambda: archnet.audit(path),
    ):
        with suppress(ArchnetError):
            use()


# The command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(untrained: RunFolder) -> RunFolder:
    return untrained


def test_verify_prints_a_table_and_keeps_it(run, capsys):
    before = json.loads(run.metrics.read_text())
    assert main(["verify", str(run.path), "inputs=40", "forms=qdq,subbyte"]) == 0
    out = capsys.readouterr().out
    assert "compared with the integer model on 40 inputs" in out
    assert "100 %" in out
    after = json.loads(run.metrics.read_text())
    entry = after.pop("verify")
    assert after == before
    assert entry["inputs"] == 40
    assert list(entry["checks"]) == [
        "pytorch float32",
        "pytorch float64",
        "student.onnx",
        "qdq",
        "subbyte",
    ]
    assert entry["checks"]["subbyte"]["bit_equal"] == 1.0


def test_verify_takes_further_images_where_the_test_split_is_small(run):
    job, _ = conductor.reopen(run)
    tests = job.test_inputs(10**9).numpy()
    found = job.inputs(len(tests) + 3).numpy()
    assert len(found) == len(tests) + 3
    np.testing.assert_array_equal(found[: len(tests)], tests)
    assert len(job.inputs(5)) == 5


def test_changed_predictions_are_the_exit_code(run, monkeypatch, capsys):
    checks = [
        Check("qdq", "onnxruntime 1", 10, 3.0, 0.999999, 2, hint="weights of 7 bits"),
        Check("qonnx", "qonnx", skipped="needs the extra: pip install 'archnet[qonnx]'"),
    ]
    monkeypatch.setattr("archnet.deploy.verify", lambda *arguments: checks)
    assert main(["verify", str(run.path), "inputs=2"]) == 1
    out = capsys.readouterr().out
    assert "99.999 %" in out
    assert "qdq: first difference at no step" in out
    assert "qdq: weights of 7 bits" in out
    assert "qonnx: skipped, it needs the extra: pip install 'archnet[qonnx]'" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inputs=0"], "inputs=0: at least one is needed"),
        (["inputs=2", "forms=qdqq"], "form=qdqq is not one of"),
        (["inputs=2", "forms=c"], "form=c is not run here"),
    ],
)
def test_errors_are_one_line(run, arguments, message, capsys):
    assert main(["verify", str(run.path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_without_a_trained_student_says_how_to_get_one(run, capsys):
    folder = RunFolder.create(run.config())
    for command in ("verify", "export"):
        assert main([command, str(folder.path)]) == 2
        assert f"finish the run with resume={folder.path}" in capsys.readouterr().err


def test_a_broken_student_onnx_is_named(run, capsys):
    content = run.onnx.read_bytes()
    run.onnx.write_bytes(content[:1000])
    try:
        assert main(["verify", str(run.path), "inputs=2", "forms=qdq"]) == 2
        assert f"cannot load {run.onnx}" in capsys.readouterr().err
    finally:
        run.onnx.write_bytes(content)


def test_the_help_lists_the_forms(capsys):
    with pytest.raises(SystemExit):
        main(["export", "-h"])
    out = capsys.readouterr().out
    assert all(f"  {form} " in out for form in FORMS)


def test_the_file_is_named_after_the_form(run, capsys):
    assert main(["export", str(run.path), "form=subbyte"]) == 0
    assert capsys.readouterr().out.strip() == str(run.path / "student_subbyte.onnx")
    assert main(["export", str(run.path), "form=c"]) == 0
    assert capsys.readouterr().out.strip() == str(run.path / "student_c.h")
