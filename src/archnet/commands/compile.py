"""`archnet compile`: a run's student, or a file, in a chip's own compiler or in a runtime."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from archnet.chips.host import TIMEOUT
from archnet.commands.cost import INPUT_HELP
from archnet.commands.folder import folder_arguments, open_folder
from archnet.errors import ArchnetError, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from archnet.chips import Bridge
    from archnet.config import DialectConfig
    from archnet.deploy.compile import Asked, Judged
    from archnet.jobs.translation import Translation
    from archnet.ops import Student
    from archnet.runs import RunFolder

HELP = "have a chip's own compiler, or a runtime, judge a run's student or a file"
INPUTS, CALIBRATION = 100, 32
SIDES = ("teacher", "student", "encoder", "decoder", "file")  # what is compiled, in this order
SHOWN = 20  # operators off the accelerator that are listed
# What a tool estimates, in the order of the table's lines.
FIGURES: Mapping[str, tuple[str, str]] = {
    "cycles": ("cycles", ",.0f"),
    "inferences_per_second": ("inferences a second", ",.1f"),
    "milliseconds": ("milliseconds on this computer", ",.3f"),
    "clock_mhz": ("clock, MHz", ",.0f"),
    "macs": ("multiply-accumulates", ",.0f"),
    "read_kb": ("read from memory, KiB", ",.0f"),
    "sram_bytes": ("SRAM, B", ",.0f"),
    "flash_bytes": ("flash, B", ",.0f"),
    "internal_bytes": ("memory of activations, B", ",.0f"),
    "weight_bytes": ("weights, B", ",.0f"),
    "encoded_weight_bytes": ("weights compressed, B", ",.0f"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from archnet.chips import tools

    folder_arguments(parser, "source", "run folder, ONNX or TensorFlow Lite file", optional=True)
    names = ", ".join(tools())
    parser.add_argument("--hardware", help="target (default: the run's, or the tool's own)")
    parser.add_argument("--tool", help=f"one of {names} (default: the target's)")
    parser.add_argument("--chip", help="the tool's name of the chip, such as ethos-u55-256")
    parser.add_argument(
        "--teacher",
        default="false",
        choices=("true", "false"),
        help="true: also compile the teacher with the same tool",
    )
    parser.add_argument(
        "--inputs", type=int, default=INPUTS, help=f"inputs to run, 0: none (default: {INPUTS})"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help=f"seconds for one network (default: {TIMEOUT})",
    )
    parser.add_argument("--input", metavar="SHAPE", help=f"for a file: {INPUT_HELP}")
    parser.add_argument("--data", type=Path, help="for a file: inputs (N, ...) as a .npy file")
    parser.add_argument(
        "--install", metavar="TOOL", help="install a tool into an environment of its own"
    )
    parser.add_argument("--python", help="with --install: the Python interpreter to use")


def run(options: argparse.Namespace) -> int:
    """Print what the tool says, and keep it with the run; 1 if operators are off the accelerator
    or predictions of a runtime changed.
    """
    from archnet.chips import bridge

    if options.install is not None:
        print(bridge(options.install).install(options.python))
        return 0
    if options.source is None:
        raise ArchnetError("say what to compile: archnet compile <run folder or file> hardware=...")
    if options.inputs < 0:
        raise ArchnetError(f"inputs={options.inputs} must be at least 0")
    if not options.timeout > 0:
        raise ArchnetError(f"timeout={options.timeout:g} must be above 0")
    if options.source.is_file():
        return _file(options)
    return _run(options)


def chosen(
    tool: str | None, hardware: str | None, chip: str | None, own: str = ""
) -> "tuple[Bridge, str]":
    """The bridge, and the chip as its tool calls it.

    Args:
        tool: None: that of the target.
        hardware: None: that of the chip, else the run's ``own``, else the tool's first.
        chip: as the tool calls it; None: its default for the target.

    Raises:
        ArchnetError: no tool compiles for the target, or it is not installed.
    """
    from archnet.chips import bridge, tool_of, tools

    target = hardware or own
    name = tool or tool_of(target)
    if not name:
        what = f"hardware={target}" if target else "a file without hardware="
        raise ArchnetError(f"no tool compiles for {what}: say tool=, one of {', '.join(tools())}")
    found = bridge(name)
    if name not in tools():
        raise ArchnetError(
            f"tool={name} writes teachers for other tools: say one of {', '.join(tools())}"
        )
    if hardware is None and found.chips:
        with_chip = [target for target, known in found.chips.items() if chip in known]
        hardware = own if own in found.chips and not with_chip else [*with_chip, *found.chips][0]
    called = found.chip(hardware or "", chip)
    if found.missing:
        raise ArchnetError(found.missing)
    return found, called


def _run(options: argparse.Namespace) -> int:
    """A finished run."""
    from archnet.deploy.compile import Asked, compile_student, compile_teacher
    from archnet.jobs import conductor
    from archnet.jobs.translation import Translation
    from archnet.runs import RunError

    folder = open_folder(options, "source")
    own = folder.config().hardware
    found, chip = chosen(options.tool, options.hardware, options.chip, own.name)
    if not folder.metrics.is_file():
        raise RunError(f"{folder.metrics} is missing: finish the run with resume={folder.path}")
    job, student = conductor.reopen(folder)
    if isinstance(job, Translation):
        return _translator(options, job, student, found, chip)
    images = job.inputs(max(options.inputs, 1)).numpy()[: options.inputs]
    calibration = _joined(job.calibration(1))[:CALIBRATION]
    asked = Asked(found, chip, images, calibration, options.timeout, _dialect(found, chip))
    name = f"{found.name} {chip}".strip()
    logs = folder.path / "compile"
    log = logs / f"{name.replace(' ', '_')}.log"
    judged = {"student": compile_student(student, asked, log, cast(Any, own.requantization))}
    if options.teacher == "true":
        with_images = replace(asked, images=images if len(images) else calibration[:1])
        beside = log.with_name(f"{log.stem}_teacher.log")
        judged["teacher"] = compile_teacher(job.teacher, with_images, student.graph.classes, beside)
    _keep(folder, name, judged)
    return _told(f"{folder.path.name}: {name}", judged, asked)


def _translator(
    options: argparse.Namespace, job: "Translation", student: "Student", found: "Bridge", chip: str
) -> int:
    """Both files of a translator, which are compiled and not run."""
    import numpy as np

    from archnet.deploy.compile import Asked, Judged

    folder, name = job.folder, f"{found.name} {chip}".strip()
    takes = found.says("SUFFIX") == ".tflite" and found.chips
    if not takes or options.teacher == "true":
        raise ArchnetError(
            f"{folder.path}: of a translator, whose two files have several inputs, the student "
            "alone is compiled, and by tools that take TensorFlow Lite alone (vela)"
        )
    none = np.zeros((0, 1), np.float32)
    asked, logs = Asked(found, chip, none, none, options.timeout), folder.path / "compile"
    judged = {}
    with tempfile.TemporaryDirectory() as temporary:
        for path in job.write(student, Path(temporary), "tflite", None):
            part = path.stem.rpartition(".")[2]
            log = logs / f"{name.replace(' ', '_')}_{part}.log"
            judged[part] = Judged(asked.compile(path.read_bytes(), False, log), "")
    _keep(folder, name, judged)
    return _told(f"{folder.path.name}: {name}", judged, asked)


def _keep(folder: "RunFolder", name: str, judged: "Mapping[str, Judged]") -> None:
    """Write what a tool said into the run's metrics and report."""
    from archnet.jobs import conductor

    sides = {side: one.summary() for side, one in judged.items()}
    conductor.add_finding(folder, "compile", {name: sides})


def _dialect(found: "Bridge", chip: str) -> "DialectConfig | None":
    """That of the target which a chip belongs to; None for a runtime, which takes any."""
    from archnet.hardware import Target

    name = next((target for target, chips in found.chips.items() if chip in chips), None)
    return None if name is None else Target.named(name).dialect


def _file(options: argparse.Namespace) -> int:
    """Anybody's file."""
    from archnet.deploy.compile import Asked, compile_file

    if options.teacher == "true":
        raise ArchnetError("teacher=true is for run folders: a file has no teacher")
    found, chip = chosen(options.tool, options.hardware, options.chip)
    images = _given(options) if options.source.suffix == ".onnx" else None
    if images is None:
        import numpy as np

        images = np.zeros((0, 1), np.float32)
    asked = Asked(found, chip, images[: options.inputs], images[:CALIBRATION], options.timeout)
    name = f"{found.name} {chip}".strip()
    log = options.source.with_name(f"{options.source.name}.{name.replace(' ', '_')}.log")
    one = compile_file(options.source, asked, log)
    return _told(f"{options.source.name}: {name}", {"file": one}, asked)


def _given(options: argparse.Namespace) -> "NDArray[np.float32]":
    """The inputs of a file: those given, or random ones of its shape."""
    import numpy as np

    from archnet.deploy.compile import input_shape
    from archnet.hardware import input_shapes

    sizes = input_shapes(options.input) if options.input is not None else None
    shape = input_shape(options.source, sizes)
    if options.data is None:
        count = max(options.inputs, CALIBRATION)
        print("inputs: random ones of a normal distribution (data=<file.npy> gives others)")
        return np.random.default_rng(0).standard_normal((count, *shape[1:])).astype(np.float32)
    try:
        values = np.load(options.data, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArchnetError(f"data={options.data} cannot be read as a .npy file: {error}") from error
    if values.shape[1:] != tuple(shape[1:]) or not len(values):
        raise ArchnetError(
            f"data={options.data} holds {values.shape}, and the file takes (N, "
            f"{', '.join(map(str, shape[1:]))})"
        )
    return values.astype(np.float32)


def _joined(batches: Sequence[Any]) -> "NDArray[np.float32]":
    import torch

    found: NDArray[np.float32] = torch.cat(list(batches)).numpy()
    return found


def _told(title: str, judged: "Mapping[str, Judged]", asked: "Asked") -> int:
    """Print one table, then what is off the accelerator; the exit code."""
    from rich.table import Table

    from archnet.chips import ChipError
    from archnet.report.table import plain_console

    shown = plain_console()
    sides = [side for side in SIDES if side in judged]
    if any(one.compiled.operators or one.inputs for one in judged.values()):
        caption = f"by {judged[sides[-1]].compiled.version}"
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        table.add_column("")
        for side in sides:
            table.add_column(side, justify="right")
        for label, *cells in lines([judged[side] for side in sides]):
            table.add_row(label, *cells)
        shown.print(table)
    for side in sides:
        _off(shown, side, judged[side])
        if judged[side].doubt:
            shown.print(printable(f"{side}: {judged[side].doubt}", 300), soft_wrap=True)
    failed = [(side, one) for side, one in judged.items() if one.compiled.error]
    for side, one in failed:
        log = f"; its log: {one.compiled.log}" if one.compiled.log else ""
        raise ChipError(f"{one.compiled.version} on the {side}: {one.compiled.error}{log}")
    last = judged[sides[-1]]
    wrong = bool(last.changed) and not asked.bridge.chips and last.bit_equal is not None
    return 1 if last.compiled.off or wrong else 0


def lines(judged: "Sequence[Judged]") -> list[list[str]]:
    """The lines of the table: what, then a cell for each network; lines without figures are out."""
    compiled = [one.compiled for one in judged]

    def counted(name: str) -> list[str]:
        return [f"{len(getattr(one, name)):,}" if one.operators else "" for one in compiled]

    def shown(name: str, form: str) -> list[str]:
        figures = [getattr(one, name) for one in judged]
        return ["" if value is None else format(value, form) for value in figures]

    found = [
        ["operators", *counted("operators")],
        [f"not on the {compiled[0].accelerator}", *counted("off")],
    ]
    for key, (label, form) in FIGURES.items():
        figures = [one.figures.get(key) for one in compiled]
        found.append([label, *("" if value is None else format(value, form) for value in figures)])
    found += [
        ["inputs run", *(f"{one.inputs:,}" if one.inputs else "" for one in judged)],
        ["held against", *(one.against if one.inputs else "" for one in judged)],
        ["predictions changed", *shown("changed", ",")],
        ["results bit-equal", *(_share(one.bit_equal) for one in judged)],
        ["steps off at most", *shown("max_steps", "g")],
    ]
    return [line for line in found if any(line[1:])]


def _share(value: float | None) -> str:
    from archnet.report.checks import percent

    return "" if value is None else percent(value)


def _off(shown: Any, side: str, one: "Judged") -> None:
    off = one.compiled.off
    for row in off[:SHOWN]:
        layer = f" (layer {row.origin})" if row.origin else ""
        why = f": {row.why}" if row.why else ""
        line = f"{side}: on the {row.where}: {row.operator} {row.name}{layer}{why}"
        shown.print(printable(line, 300), soft_wrap=True)
    if len(off) > SHOWN:
        shown.print(f"{side}: and {len(off) - SHOWN} more")
