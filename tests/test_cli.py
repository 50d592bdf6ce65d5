"""The `archnet` command on a finished run and on what is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import archnet
from archnet.cli import main
from archnet.quant import settle
from archnet.runs import RunFolder
from archnet.runs.student import load_student

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(untrained: RunFolder) -> RunFolder:
    return untrained


def test_audit_finds_the_student_pure(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(run.onnx), "hardware=arch5"]) == 0
    assert "pure under arch5" in capsys.readouterr().out


def test_audit_of_a_foreign_file_lists_violations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["x"], ["y"])], "g", value[:1], value[1:]
    )
    path = tmp_path / "softmax.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    assert main(["audit", str(path)]) == 1
    out = capsys.readouterr().out
    assert "Softmax" in out
    assert "not pure" in out


def test_export_writes_the_student_again(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "again.onnx"
    assert main(["export", str(run.path), f"output={path}"]) == 0
    assert path.read_bytes() == run.onnx.read_bytes()


def test_evaluate_says_what_the_run_said(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run.path)]) == 0
    scores = json.loads(capsys.readouterr().out)
    metrics = json.loads(run.metrics.read_text())
    assert scores["student"]["accuracy"] == metrics["student"]["accuracy"]
    assert scores["agreement"] == metrics["student"]["agreement"]


def test_report_is_written_anew(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path / "report.html").unlink()
    assert main(["report", str(run.path)]) == 0
    assert "agreement" in capsys.readouterr().out
    assert (run.path / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "missing.onnx"], "missing.onnx is not a file"),
        (["evaluate", "nowhere"], "nowhere is no run folder"),
        (["export", "nowhere"], "nowhere is no run folder"),
        (["report", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("archnet: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_unfinished_run_says_how_to_finish_it(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(run.config())
    assert main(["export", str(folder.path)]) == 2
    assert f"finish the run with resume={folder.path}" in capsys.readouterr().err


def test_an_unknown_form_is_an_error(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run.path), "form=qdqq"]) == 2
    assert "qdq" in capsys.readouterr().err


def test_the_student_is_read_back_as_it_was_written(run: RunFolder) -> None:
    x_BCHW = torch.rand(2, 1, 28, 28)
    student = load_student(run)
    again = load_student(run, "calibrated")
    settle(again)  # as the run did after training, here of no step
    assert torch.equal(student(x_BCHW), again(x_BCHW))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adit", "x.onnx"], "adit is not a command of archnet; nearest valid: audit"),
        (["veryfy"], "nearest valid: verify"),
        (
            ["export", "x", "frm=qdq"],
            "frm is not an option of archnet export; nearest valid: form",
        ),
        (["audit", "x", "--hardwre", "y"], "nearest valid: hardware"),
        (["export", "x", "opset=y"], "invalid int value: 'y'"),
        (["audit"], "the following arguments are required: file"),
        ([], "the following arguments are required: command"),
    ],
)
def test_what_is_not_understood_names_what_is_near(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("archnet: ")
    assert error.count("\n") == 1


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "archnet", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == f"archnet {archnet.__version__}\n"


def test_output_that_nobody_reads_is_no_error() -> None:
    command = f"{sys.executable} -m archnet --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
