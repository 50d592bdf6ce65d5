"""Bridges to vendors' tools: on answers that each tool gave once, and on the tool where it is."""

import csv
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import archnet
import one_operator
from archnet.chips import ChipError, bridge, serve, tool_of, tools
from archnet.chips.host import READY, bridges, origin_of
from archnet.cli import main
from archnet.compose import compose
from archnet.deploy import to_integers
from archnet.deploy.compile import Asked, compile_file, compile_student, compile_teacher
from archnet.errors import ArchnetError
from archnet.hardware import Layer, Target
from archnet.jobs import conductor
from archnet.jobs.conductor import FINDINGS
from archnet.ops import (
    Activation,
    BatchNorm,
    Convolution,
    FullyConnected,
    MaxPool,
    Pad,
    Permute,
    Reshape,
    Student,
)
from archnet.quant import Recipe, quantize, settle
from archnet.runs import RunFolder, read_json
from conftest import CONF
from test_deploy import chain
from test_deploy import student as graph_of
from test_outputs import two

RECORDED = Path(__file__).parent / "recorded"
BEHAVIOURS = {
    "crash": "import os; os.kill(os.getpid(), 11)",
    "noise": "print('... 100 % ...')",
    "says": "import sys; print('E RKNN: [0:1.2] no room in /a/b/c'); sys.exit(3)",
    "hang": "import time; time.sleep(60)",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARCHNET_CHIPS", str(tmp_path / "chips"))
    return tmp_path / "chips"


def installed(place: Path, tool: str, program: str) -> None:
    """An environment whose interpreter runs ``program`` on the request in ``folder``."""
    python = place / tool / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nfolder = pathlib.Path(sys.argv[-1])\n{program}\n"
    )
    python.chmod(0o755)


def replayed(place: Path, tool: str, change: str = "") -> None:
    """An environment that answers what the tool has answered once."""
    installed(
        place,
        tool,
        f"import json, numpy\nkept = json.loads(pathlib.Path({str(RECORDED / tool)!r} + '.json')"
        f".read_text())\n{change}\n"
        "(folder / 'answer.json').write_text(json.dumps(kept['answer']))\n"
        "if kept['scores']:\n"
        "    numpy.save(folder / 'scores.npy', numpy.reshape(kept['scores'], kept['shape']))\n",
    )


# What a bridge says of itself -------------------------------------------------------------------


@pytest.mark.parametrize("tool", bridges())
def test_a_bridge_says_what_it_is_without_its_tool(tool: str) -> None:
    found = bridge(tool)
    assert found.says("ABOUT")
    assert found.says("ACCELERATOR")
    assert found.says("SUFFIX") in (".onnx", ".tflite", ".pt2")
    assert found.version
    assert callable(found.says("run"))
    for target, chips in found.chips.items():
        assert found.chip(target) == chips[0]
        assert tool_of(target) == tool


def test_an_unknown_tool_names_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.onnx").touch()
    assert main(["compile", str(tmp_path / "x.onnx"), "tool=openvin"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("nearest: openvino")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compile"], "say what to compile"),
        (["compile", "."], "is no run folder"),
        (["compile", "x.onnx", "inputs=-1"], "inputs=-1 must be at least 0"),
        (["compile", "x.onnx", "timeout=0"], "timeout=0 must be above 0"),
        (["compile", "--install", "rkn"], "nearest: rknn"),
        (["compile", "--install", "tract", "--python", "python0.1"], "there is no such program"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_chip_that_a_tool_does_not_know_is_one_line() -> None:
    with pytest.raises(ChipError, match="nearest: ethos-u55-128"):
        bridge("vela").chip("ethos_u55", "ethos-u55-129")
    with pytest.raises(ChipError, match="does not compile for hardware=imx500"):
        bridge("rknn").chip("imx500")
    with pytest.raises(ChipError, match="leave it out"):
        bridge("tract").chip("", "npu")


# Answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", tools())
def test_a_recorded_answer_is_read(tool: str, place: Path, tmp_path: Path) -> None:
    path = RECORDED / f"{tool}.json"
    if not path.is_file():
        pytest.skip(f"no answer of {tool} is recorded")
    kept = json.loads(path.read_text())
    replayed(place, tool)
    log = tmp_path / "kept" / "log"
    found = bridge(tool).compile(b"file", kept["chip"], log=log, origins={NODE: "layer1.conv"})
    assert found.error == ""
    assert found.version == f"{bridge(tool).says('PACKAGE')} {bridge(tool).version}"
    assert log.is_file()
    assert len(found.operators) == len(kept["answer"].get("operators", []))
    off = [row.operator for row in found.off]
    expected = {"rknn": ["exNorm"], "vela": ["StridedSlice"]}
    expected["qnn"] = ["DequantizeLinear", "Erf", "QuantizeLinear"]
    assert off == expected.get(tool, [])
    assert all(row.origin == "layer1.conv" for row in found.operators if NODE in row.name)
    if kept["scores"]:
        assert found.scores is not None
        assert found.scores.shape == tuple(kept["shape"])
    json.dumps(found.summary())


NODE = one_operator.NAME


def test_the_reason_of_the_compiler_stands_beside_the_operator(place: Path) -> None:
    replayed(place, "vela")
    (row,) = bridge("vela").compile(b"").off
    assert row.why.startswith("StridedSlice with unsupported stride axis")


def test_rockchips_table_is_read_from_its_log() -> None:
    module = bridge("rknn").module
    log = (RECORDED / "rknn.log").read_text()
    rows = module.operators(log)
    assert [(row["operator"], row["where"], row["cycles"]) for row in rows] == [
        ("ConvRelu", "NPU", 256),
        ("exNorm", "CPU", 0),
        ("Conv", "NPU", 364),
    ]
    assert NODE in rows[1]["name"]
    figures = module.figures(rows, log)
    assert (figures["cycles"], figures["internal_bytes"], figures["weight_bytes"]) == (
        620,
        2432,
        512,
    )
    # The last table counts: a build prints one before it has placed anything.
    assert module.operators(log + log) == rows
    assert module.operators("noise") == []


def test_velas_tables_are_read() -> None:
    module = bridge("vela").module
    printed = (RECORDED / "vela.log").read_text()
    with (RECORDED / "vela_layers.csv").open(newline="") as file:
        rows = module.operators(list(csv.DictReader(file)), printed)
    assert [row["where"] for row in rows].count("CPU") == 1
    with (RECORDED / "vela_summary.csv").open(newline="") as file:
        (summary,) = csv.DictReader(file)
    figures = module.figures(summary, printed)
    assert (figures["cpu_operators"], figures["npu_operators"]) == (1, 5)
    assert figures["inferences_per_second"] > 1000
    with pytest.raises(RuntimeError, match="no count of operators"):
        module.figures(summary, "")


def test_the_longest_node_in_a_name_is_its_layer() -> None:
    layers = {"conv": "a", "conv_1": "b", "": "c"}
    assert origin_of("Conv:conv_1_ConvAdd", layers) == "b"
    assert origin_of("fc", layers) == ""


# Failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("crash", "it was ended by SIGSEGV"),
        ("noise", "it ended without an answer"),
        ("says", "it ended with status 3: no room in c"),
        ("hang", "not done after 2 s"),
    ],
)
def test_a_tool_that_fails_is_one_line_and_its_log_is_kept(
    behaviour: str, said: str, place: Path, tmp_path: Path
) -> None:
    installed(place, "rknn", BEHAVIOURS[behaviour])
    log = tmp_path / "log"
    found = bridge("rknn").compile(b"", "rk3588", timeout=2, log=log)
    assert found.error.startswith(said)
    assert "\n" not in found.error
    assert log.is_file()


def test_what_was_told_before_a_crash_is_kept(place: Path) -> None:
    replayed(place, "rknn")
    python = place / "rknn" / "bin" / "python"
    python.write_text(python.read_text() + BEHAVIOURS["crash"])
    found = bridge("rknn").compile(b"", "rk3588")
    assert found.error == "it was ended by SIGSEGV"
    assert [row.operator for row in found.off] == ["exNorm"]
    assert found.scores is not None


def test_another_version_is_one_line(place: Path) -> None:
    replayed(place, "tract", "kept['answer'] = {'version': 'tract 0.1', 'pinned': False}")
    with pytest.raises(ChipError, match=r"has tract 0\.1.*its bridge is for .*--install tract"):
        bridge("tract").compile(b"")


def test_a_missing_tool_says_what_to_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.onnx"
    file.write_bytes(one_operator.model("add").SerializeToString())
    for words in (["hardware=rk3588"], ["tool=rknn"]):
        assert main(["compile", str(file), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("archnet compile --install rknn")


def test_an_environment_is_made_once_and_anew_for_other_requirements(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(
        "archnet.chips.host._called", lambda command, tool: calls.append(list(command))
    )
    found = bridge("tract")
    (place / "tract").mkdir(parents=True)
    found.install()
    assert [call[1:3] for call in calls] == [["-m", "venv"], ["-m", "pip"]]
    assert (place / "tract" / READY).read_text() == found.requirements
    found.install()
    assert len(calls) == 2
    (place / "tract" / READY).write_text("tract==0.1\n")
    found.install()
    assert len(calls) == 4
    calls.clear()
    monkeypatch.setattr("archnet.chips.host.Bridge.says", lambda self, name, otherwise=None: None)
    bridge("rknn")._make(sys.executable)
    (pip,) = calls[1:]
    assert "--no-deps" in pip


@pytest.mark.parametrize(
    ("printed", "rows"),
    [
        (
            "2026-11-28 04:11:31,528 ERROR : CODE: [INVOP] The network is not aligned with SDSP "
            "converter's restrictions. Errors are:\nNode [Framework.nnir] op: FullyConnected, id: "
            "pool_fc, [Framework.onnx] op: MatMul, id: pool_fc, errors:\n\tInput error - input "
            "index: 0, input node: pool, reason: Only 2d input (N,D) is supported\n-----\nNode "
            "[Framework.nnir] op: Pad, id: pad, [Framework.onnx] op: Pad, id: pad, errors:\n"
            "\tParam error - name: pads, reason: negative pads [/logger.py:185]\n",
            [
                ("pool_fc", "FullyConnected", "Only 2d input (N,D) is supported"),
                ("pad", "Pad", "negative pads"),
            ],
        ),
        (
            "ERROR: CODE: [VE] Verification Error: Quantization verification failed: \n"
            "2026-11-28 04:08:14.018 ERROR: CODE: [GE] Layer MatMulBias: fc is not quantized \n",
            [("fc", "MatMulBias", "is not quantized")],
        ),
        ("INFO : Converted successfully", []),
    ],
)
def test_layers_that_sonys_converter_refuses_are_named(
    printed: str, rows: list[tuple[str, str, str]]
) -> None:
    found = bridge("imx500").module.refused(printed)
    assert [(row["name"], row["operator"], row["why"]) for row in found] == rows


# What runs in the tool's interpreter ------------------------------------------------------------


def served(folder: Path, program: str, **asked: object) -> dict[str, object]:
    """The answer of a bridge whose tool is numpy."""
    version = asked.pop("version", np.__version__)
    request = {"file": "f", "chip": "", "quantize": False, "package": "numpy", "version": version}
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "log").touch()
    np.save(folder / "inputs.npy", np.ones((3, 2, 2), np.float32))
    (folder / "b.py").write_text(program)
    serve.serve(folder / "b.py", folder)
    found: dict[str, object] = json.loads((folder / "answer.json").read_text())
    return found


def test_a_bridge_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MOST_RUNS", 3)
    program = "def run(request):\n    request.run(lambda x: [x.sum((1, 2))[None]])\n"
    answer = served(tmp_path, program)
    assert answer["done"]
    assert np.load(tmp_path / "scores.npy").tolist() == [[4.0]] * 3


def test_what_a_tool_raises_is_its_answer(tmp_path: Path) -> None:
    answer = served(tmp_path, "def run(request):\n    raise KeyError('LayerNorm')\n")
    assert answer["error"] == "KeyError: 'LayerNorm'"
    assert "done" not in answer


def test_a_bridge_is_not_served_to_another_version(tmp_path: Path) -> None:
    answer = served(tmp_path, "raise ValueError", version="0.1")
    assert answer["pinned"] is False


# Students ---------------------------------------------------------------------------------------


def small() -> tuple[torch.nn.Module, torch.Tensor]:
    """A student at W4A4, and inputs (4, 3, 8, 8)."""
    torch.manual_seed(0)
    layers = Convolution(3, 8), Activation(0), MaxPool(2), Convolution(8, 4)
    student = chain((3, 8, 8), *layers)
    x = torch.randn(4, 3, 8, 8)
    quantize(student, Recipe(4, 4), calibration=[x])
    return student, x


@pytest.mark.parametrize(("off_by", "changed"), [(0, 0), (3, 0), (10**6, 4)])
def test_results_are_held_against_the_golden_model(off_by: int, changed: int, place: Path) -> None:
    student, x = small()
    model = to_integers(student)
    golden = np.concatenate([model.run(x.numpy())[model.outputs[0]]])
    found = golden * model.unit(model.outputs[0])
    # The winner of each row falls by so many steps.
    found = found.reshape(-1, found.shape[-1])
    scores = found.copy()
    rows = np.arange(len(scores))
    scores[rows, scores.argmax(-1)] -= off_by * float(model.unit(model.outputs[0]).min())
    np.save(place.parent / "scores.npy", scores.reshape(golden.shape))
    installed(
        place,
        "tract",
        f"import json, shutil\nshutil.copy({str(place.parent / 'scores.npy')!r}, folder)\n"
        "(folder / 'answer.json').write_text(json.dumps({'version': 'tract 1', 'done': True}))",
    )
    nothing = np.zeros((0, 3, 8, 8), np.float32)
    asked = Asked(bridge("tract"), "", x.numpy(), nothing)
    judged = compile_student(student, asked)
    assert judged.inputs == 4
    assert judged.max_steps == off_by
    assert (judged.bit_equal == 1) == (off_by == 0)
    assert (judged.changed == 0) == (changed == 0)


@cache
def several(quantized: bool) -> tuple[Student, torch.Tensor]:
    """A student with class scores and a map of them, and inputs."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 12, 12)
    student = archnet.convert(two().eval(), x, classes=1)
    return (settled(student, x) if quantized else student), x


def settled(student: Student, x: torch.Tensor) -> Student:
    settle(quantize(student, Recipe(8, 8), calibration=[x]))
    return student


@pytest.mark.parametrize("output", [0, 1])
def test_every_output_is_held_against_the_golden_model(output: int, place: Path) -> None:
    student, x = several(True)
    model = to_integers(student)
    golden = [
        part * model.unit(name)
        for part, name in zip(model.results(x.numpy()), model.outputs, strict=True)
    ]
    axis = student.graph.classes[output]
    assert axis is not None
    # One decision of the first sample falls.
    worst = np.moveaxis(golden[output], axis, 1)[0].reshape(golden[output].shape[axis], -1)[:, 0]
    worst[worst.argmax()] -= 1e6
    np.save(place.parent / "scores.npy", np.hstack([part.reshape(6, -1) for part in golden]))
    installed(
        place,
        "tract",
        f"import json, shutil\nshutil.copy({str(place.parent / 'scores.npy')!r}, folder)\n"
        "names = json.loads((folder / 'request.json').read_text())['outputs']\n"
        f"assert names == {student.graph.output_names}\n{DONE}",
    )
    judged = compile_student(student, Asked(bridge("tract"), "", x.numpy(), x.numpy()[:0]))
    assert judged.compiled.error == ""
    assert (judged.changed, judged.inputs) == (1, 6)
    assert judged.bit_equal is not None
    assert 1 - judged.bit_equal == pytest.approx(1 / sum(part.size for part in golden))


MADE = "(folder / 'made').write_bytes(b'a file of ' + (folder / 'network.pt2').read_bytes()[:2])"
DONE = (
    "import json\n(folder / 'answer.json').write_text(json.dumps({'version': 'x', 'done': True}))"
)
SEEN = "assert (folder / 'network.tflite').read_bytes() == b'a file of PK'"


@pytest.mark.parametrize(
    ("converter", "said"),
    [
        (f"{MADE}\n{DONE}", ""),
        (DONE, "tool=vela takes TensorFlow Lite, and x fails"),
        (BEHAVIOURS["says"], "litert-torch .* fails: it ended with status 3"),
        (None, "archnet compile --install litert_torch"),
    ],
)
def test_a_teacher_is_written_as_tensorflow_lite_by_a_converter(
    converter: str | None, said: str, place: Path, tmp_path: Path
) -> None:
    if converter is not None:
        installed(place, "litert_torch", converter)
    installed(place, "vela", f"{SEEN}\n{DONE}")
    x = np.zeros((2, 3, 8, 8), np.float32)
    asked = Asked(bridge("vela"), "ethos-u55-128", x[:1], x)
    teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    log = tmp_path / "teacher.log"
    if said:
        with pytest.raises(ArchnetError, match=said):
            compile_teacher(teacher, asked, [1], log)
    else:
        assert compile_teacher(teacher, asked, [1], log).compiled.error == ""
        assert (tmp_path / "teacher_litert_torch.log").is_file()


def test_a_converter_is_no_tool_to_ask_for(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(bridges()) - set(tools()) == {"litert_torch"}
    (tmp_path / "x.onnx").touch()
    assert main(["compile", str(tmp_path / "x.onnx"), "tool=litert_torch"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tool=litert_torch writes teachers for other tools: say one of imx500, litert" in line


# Of a run ---------------------------------------------------------------------------------------


def test_what_commands_find_stays_when_a_finished_run_is_opened_again(
    untrained: RunFolder, place: Path
) -> None:
    for tool in ("tract", "opencv"):
        installed(place, tool, DONE)
        assert main(["compile", str(untrained.path), f"tool={tool}", "inputs=2"]) == 0
    assert main(["verify", str(untrained.path), "inputs=2", "forms=qdq"]) == 0
    before = read_json(untrained.metrics, dict)
    assert list(before["compile"]) == ["tract", "opencv"]
    for _ in range(2):
        assert "By vendors' tools" in (untrained.path / "report.html").read_text()
        conductor.run(compose(CONF, [f"resume={untrained.path}"]), ["resume"])
        after = read_json(untrained.metrics, dict)
        assert {key: after[key] for key in FINDINGS} == {key: before[key] for key in FINDINGS}


# Real tools -------------------------------------------------------------------------------------


def real(tool: str) -> None:
    if bridge(tool).missing:
        pytest.skip(bridge(tool).missing)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("tool", ["onnxruntime", "openvino", "tract", "opencv", "mnn", "litert"])
def test_a_runtime_gives_every_output(tool: str, quantized: bool, tmp_path: Path) -> None:
    real(tool)
    if tool == ("mnn" if quantized else "litert"):
        pytest.skip(f"{tool} takes no such file")
    student, x = several(quantized)
    asked = Asked(bridge(tool), "", x.numpy(), x.numpy()[:0])
    found = [compile_student(student, asked)]
    if tool != "litert":
        file = archnet.export(student, tmp_path / "x.onnx")
        found.append(compile_file(file, asked))
    for judged in found:
        assert judged.compiled.error == ""
        assert judged.compiled.scores is not None
        assert judged.compiled.scores.shape == (6, 5 + 4 * 36)
        assert judged.changed == 0


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("tool", ["onnxruntime", "openvino", "tract", "opencv", "litert"])
def test_a_runtime_takes_a_table_of_positions(tool: str, bits: int) -> None:
    """A batch norm over all elements, behind moves, and bounds inside of a byte."""
    real(tool)
    torch.manual_seed(0)
    norm = BatchNorm(17 * 6)
    norm.running_mean.normal_()
    net = graph_of(
        (3, 4, 4),
        ("stem", Convolution(3, 6), "x"),
        ("grid", Activation(), "stem"),
        ("flat", Reshape((6, 16)), "grid"),
        ("last", Permute((0, 2, 1)), "flat"),
        ("class", Pad(((1, 0), (0, 0))), "last"),
        ("wide", Reshape((17 * 6,)), "class"),
        ("positions", norm, "wide"),
        ("held", Activation(-0.7, 0.7), "positions"),
        ("head", FullyConnected(17 * 6, 5), "held"),
    )
    x = torch.randn(20, 3, 4, 4)
    settle(quantize(net, Recipe(8, bits), calibration=[x]))
    judged = compile_student(net, Asked(bridge(tool), "", x.numpy(), x.numpy()[:0]))
    assert judged.compiled.error == ""
    assert judged.changed == 0
    assert judged.bit_equal == 1 or tool == "litert"  # whose results have 16 bits


@pytest.mark.parametrize("tool", ["onnxruntime", "openvino", "tract", "litert"])
def test_a_runtime_gives_the_golden_model(tool: str) -> None:
    real(tool)
    student, x = small()
    asked = Asked(bridge(tool), "", x.numpy(), x.numpy()[:0])
    judged = compile_student(student, asked)
    assert judged.compiled.error == ""
    assert judged.changed == 0
    assert judged.bit_equal == 1 or tool == "litert"  # whose results have 16 bits


# Every operator takes seconds in a compiler: a few by default, all with the marker.
QUICK = ("conv", "softmax", "layernorm")


# What a tool takes of some shapes alone, and a target's list cannot say.
PARTLY = {("imx500", "matmul"), ("imx500", "fully_connected"), ("imx500", "instancenorm")}


def probes() -> list[object]:
    found = []
    for tool, targets in (
        ("rknn", ("rk3588", "rk3566", "rv1106", "rv1103b")),
        ("qnn", ("qnn_htp",)),
        ("imx500", ("imx500",)),
    ):
        for target in targets:
            for operator in (name for name in one_operator.ALL if (target, name) not in PARTLY):
                quick = operator in QUICK and target in ("rk3566", "rv1106")
                marks = () if quick else (pytest.mark.slow,)
                found.append(pytest.param(tool, target, operator, marks=marks))
    return found


def runs(tool: str, target: str, operator: str) -> bool:
    """Whether a tool runs an operator on the accelerator."""
    found = bridge(tool)
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    content = one_operator.model(operator).SerializeToString()
    # The plug-in of ONNX Runtime tells where nodes run once they have run.
    inputs = x[:1] if tool == "qnn" else None
    compiled = found.compile(content, found.chip(target), inputs, x, timeout=300)
    return not compiled.error and not compiled.off


@pytest.mark.parametrize(("tool", "target", "operator"), probes())
def test_a_target_says_what_its_tool_says(tool: str, target: str, operator: str) -> None:
    real(tool)
    window = {"conv3x3": (3, 3), "conv1x1": (1, 1), "maxpool2x2": (2, 2)}.get(operator, ())
    kind = {"conv3x3": "conv", "conv1x1": "conv", "maxpool2x2": "maxpool"}.get(operator, operator)
    step = (2, 2) if kind == "maxpool" else (1, 1)
    layer = Layer(kind, window, step if window else (), channels=16)
    described = Target.named(target)
    said = described.states(layer) and not described.judge(layer)[1]
    assert runs(tool, target, operator) == said


# As Google's converter writes them; ELU and exp its quantizer leaves in float.
FUNCTIONS = {
    "softmax": lambda x: x.softmax(1),
    "layernorm": lambda x: torch.layer_norm(x.movedim(1, -1), (16,)).movedim(-1, 1),
    "gelu": torch.nn.functional.gelu,
    "hardswish": torch.nn.functional.hardswish,
    "div": lambda x: x / (x + 1),
    "sqrt": torch.sqrt,
    "sin": torch.sin,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ethos_u55", "ethos_u85"])
@pytest.mark.parametrize("operator", list(FUNCTIONS))
def test_arms_targets_say_what_vela_says(target: str, operator: str) -> None:
    real("vela")
    real("litert_torch")

    class Between(torch.nn.Module):
        """The operator between two convolutions, as in `one_operator`."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = FUNCTIONS[operator](self.before(x).relu())
            return self.after(found)  # type: ignore[no-any-return]

    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    found = bridge("vela")
    judged = compile_teacher(Between().eval(), Asked(found, found.chip(target), x[:1], x), [1])
    assert judged.compiled.error == ""
    described = Target.named(target)
    assert (not judged.compiled.off) == (operator in described.operators)
    assert described.states(Layer(operator))
