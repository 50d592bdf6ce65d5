"""`archnet cost` on a run, on files of anybody, and on what is neither."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import archnet
from archnet.cli import main
from archnet.deploy import ExportError
from archnet.deploy.latency import export_teacher, latencies, without_quantizers
from archnet.hardware import student_cost
from archnet.runs import RunFolder
from archnet.runs.student import load_student

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(untrained: RunFolder) -> RunFolder:
    return untrained


def lines(capsys: pytest.CaptureFixture[str], name: str) -> list[list[str]]:
    """The cells of the table rows that begin with a name."""
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if row and row[0].startswith(name)]


def test_a_run_stands_beside_its_teacher(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", str(run.path)]) == 0
    stem, way = lines(capsys, "features.0")
    assert stem[1] == way[1] == "Convolution"
    teacher, student = stem[2:7], stem[7:]
    assert teacher[0] == student[0] == "113 k"
    assert teacher[1] == "7.23 M"
    assert main(["cost", str(run.path), "rows=32", "columns=32"]) == 0
    out = capsys.readouterr().out
    assert "32x32 systolic array, output stationary" in out
    assert "student: " in out


def test_a_run_says_how_operators_are_written_and_why(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", str(run.path)]) == 0
    rows = [row for row in lines(capsys, "") if len(row) == 5]
    found = {row[1]: row[2:4] for row in rows}
    assert found["Mean"] == ["flat and layer", "mean is not an operator of arch5"]
    assert found["FullyConnected"] == ["itself", ""]
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "flat and layer (mean is not an operator of arch5)" in page


def test_latency_is_measured_side_by_side(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", str(run.path), "latency=true", "runs=3"]) == 0
    rows = {row[0]: row[1:] for row in lines(capsys, "") if len(row) == 3}
    assert {"teacher, float", "student, float", "student, qdq"} <= set(rows)
    assert rows["student, float"][1] == "1.00"


def test_a_file_of_anybody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = numpy_helper.from_array(np.zeros((6, 4, 5, 5), np.float32), "w")
    value = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 12, 12]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 8, 8]),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], name="five"),
        helper.make_node("Sigmoid", ["h"], ["y"], name="gate"),
    ]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [weight])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    assert main(["cost", str(path), "latency=true", "runs=2"]) == 0
    out = capsys.readouterr().out
    assert "38.4 k" in out  # 64 positions, 100 deep, 6 filters
    assert "not in these MACs: 1 Sigmoid" in out
    assert "net.onnx" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows=0"], "rows=0 must be above zero"),
        (["bandwidth=-1"], "bandwidth=-1.0 must be above zero"),
        (["dataflow=row"], "dataflow=row is not one of output, weight, input"),
        (["runs=0"], "runs=0 must be at least 1"),
        ([], "neither a run folder nor a file"),
    ],
)
def test_what_is_impossible_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", str(tmp_path / "absent.onnx"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_broken_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    assert main(["cost", str(path)]) == 2
    assert "is no valid ONNX model" in capsys.readouterr().err
    assert main(["cost", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_the_float_student_keeps_its_shape(run: RunFolder, tmp_path: Path) -> None:
    student = load_student(run)
    floating = without_quantizers(student)
    assert student_cost(floating).macs == student_cost(student).macs
    assert {step.weight_bits for step in student_cost(floating).steps} == {32}
    path = archnet.export(floating, tmp_path / "float.onnx")
    found = latencies({"a": path, "b": path}, torch.zeros(1, 1, 28, 28), runs=3)
    assert set(found) == {"a", "b"}
    assert min(found.values()) > 0


def test_a_teacher_that_torch_cannot_export_says_so(tmp_path: Path) -> None:
    class Teacher(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match="torch cannot export this teacher"):
        export_teacher(Teacher(), torch.zeros(1, 1, 4, 4), tmp_path / "teacher.onnx")
