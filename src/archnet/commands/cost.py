"""`archnet cost`: multiply-accumulates, bit operations, bytes, cycles and, if asked, latency."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from archnet.commands.folder import folder_arguments, open_folder
from archnet.errors import ArchnetError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from archnet.hardware import Cost, StepCost, SystolicArray
    from archnet.lower import SampleCost
    from archnet.ops import Student
    from archnet.runs import RunFolder

INPUT_HELP = (
    "sizes that an ONNX file leaves open: 1x3x640x640; several inputs: name:1x3x640x640,other:1x4"
)
HELP = "what a run's teacher and student cost, or an ONNX file: MACs, BOPs, bytes, cycles, latency"
COLUMNS = ("MACs", "BOPs", "weights", "live", "cycles")
# Rows of a table; of longer files the rest is in one row, and in the totals.
MOST_ROWS = 1_000
# Where the output is no terminal, the table is as wide as it needs to be.
WIDTH = 150


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser, "source", "run folder or ONNX file")
    parser.add_argument("--input", metavar="SHAPE", help=INPUT_HELP)
    parser.add_argument("--rows", type=int, default=16, help="rows of the systolic array (16)")
    parser.add_argument(
        "--columns", type=int, default=16, help="columns of the systolic array (16)"
    )
    parser.add_argument(
        "--dataflow", default="output", help="what stays in the array: output, weight or input"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=64.0, help="on-chip bytes a cycle to and from it (64)"
    )
    parser.add_argument(
        "--latency",
        default="false",
        choices=("true", "false"),
        help="time teacher and student in ONNX Runtime (one thread, batch 1)",
    )
    parser.add_argument(
        "--runs", type=int, default=100, help="runs of each network that latency takes (100)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    from archnet.hardware import SystolicArray
    from archnet.report.table import plain_console

    array = SystolicArray(options.rows, options.columns, options.dataflow, options.bandwidth)
    if options.runs < 1:
        raise ArchnetError(f"runs={options.runs} must be at least 1")
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(WIDTH)
    if options.source.is_dir():
        if options.input is not None:
            raise ArchnetError("input= is for ONNX files: a run knows the sizes of its inputs")
        _run_folder(console, open_folder(options, "source"), array, options)
    else:
        _file(console, options.source, array, options)
    return 0


def _run_folder(
    console: "Console", folder: "RunFolder", array: "SystolicArray", options: argparse.Namespace
) -> None:
    from archnet.hardware import teacher_cost
    from archnet.jobs import conductor

    job, student = conductor.reopen(folder)
    example = job.example()
    before = teacher_cost(job.teacher, example, weight_bits=8, act_bits=8)
    deployed = job.sample_cost(student)
    after = deployed.cost
    layers = _layers(before, after)
    sides = ("teacher", before), ("student", after)
    _show(console, f"{folder.path} (teacher: as at W8A8)", layers, sides, array)
    if deployed.about:
        _say(console, f"figures are for {deployed.about}")
    _show_ways(console, student, deployed)
    if options.latency == "true":
        from archnet.deploy.latency import export_teacher, latencies, without_quantizers

        picture = job.inputs(1)
        with tempfile.TemporaryDirectory() as temporary:
            import archnet

            place = Path(temporary)
            files = {}
            try:
                files["teacher, float"] = export_teacher(
                    job.teacher, picture, place / "teacher.onnx"
                )
            except ArchnetError as error:
                console.print(f"left out: {error}", markup=False)
            floating = without_quantizers(student)
            files["student, float"] = archnet.export(floating, place / "float.onnx")
            form = job.form
            if form != "float":
                files[f"student, {form}"] = archnet.export(
                    student, place / "student.onnx", form=form
                )
            _show_latencies(console, latencies(files, picture, options.runs))


def _show_ways(console: "Console", student: "Student", deployed: "SampleCost") -> None:
    """How the target writes each whole operator, why, and what that costs by its own figures."""
    from rich.table import Table

    from archnet.lower import target_of
    from archnet.report.table import amount

    cycles: dict[str, float] = {}
    for name, estimate in deployed.cycles.items():
        whole = deployed.whole[name]
        cycles[whole] = cycles.get(whole, 0.0) + estimate
    rows: dict[tuple[str, ...], list[float]] = {}
    for step in student.graph.steps:
        if step.name in deployed.ways or cycles.get(step.name):
            way, why = deployed.ways.get(step.name, "itself"), deployed.reasons.get(step.name, "")
            kind = type(student.operator(step.name)).__name__
            key = step.origin or "(no module)", kind, way, why
            rows.setdefault(key, []).append(cycles.get(step.name, 0.0))
    target = target_of(student)
    table = Table(
        title=f"operators of the student on {target.name}", title_justify="left", header_style=""
    )
    for column in ("layer", "operator", "written as", "why not as itself"):
        table.add_column(column, overflow="fold")
    table.add_column("estimated\ncycles", justify="right")
    for (layer, kind, *others), found in list(rows.items())[:MOST_ROWS]:
        many = f"{len(found)} x {kind}" if len(found) > 1 else kind
        table.add_row(layer, many, *others, amount(sum(found), ""))
    table.add_section()
    table.add_row("in all", "", "", "", amount(sum(cycles.values()), ""))
    console.print(table, markup=False)
    _say(
        console,
        "written as: the lowering with the fewest cycles, as estimated from the target's costs "
        "(hardware.costs), among those that the target runs",
    )


def _file(
    console: "Console", path: Path, array: "SystolicArray", options: argparse.Namespace
) -> None:
    from archnet.hardware import input_shapes, onnx_cost

    if not path.is_file():
        raise ArchnetError(f"{path} is neither a run folder nor a file")
    given = input_shapes(options.input) if options.input is not None else None
    cost = onnx_cost(path, given)
    layers = [(printable(step.name), printable(step.operator), [[step]]) for step in cost.steps]
    _show(console, f"{printable(path, None)} (widths as stored)", layers, [("file", cost)], array)
    _say(console, f"  inputs: {_inputs(cost)}")
    if cost.unknown:
        some = ", ".join(map(printable, cost.unknown[:3])) + (
            ", …" if len(cost.unknown) > 3 else ""
        )
        _say(console, f"  {len(cost.unknown):,} with unknown MACs: {some}; {_why(cost)}")
    elif cost.activation_bytes is None:
        _say(console, f"  the activations are unknown: a shape cannot be inferred; {_why(cost)}")
    if options.latency == "true":
        _show_latencies(console, _file_latency(path, options.runs, cost))


def _inputs(cost: "Cost[int | None]") -> str:
    """The shapes that the figures are for."""
    from archnet.hardware import sizes

    text = ", ".join(
        f"{printable(name)} {sizes(shape) or 'one'}" for name, shape in cost.inputs.items()
    )
    return f"{text}; figures are for one sample of {cost.batch}" if cost.batch > 1 else text


def _why(cost: "Cost[int | None]") -> str:
    """What a user can do where shapes are not known."""
    if any(None in shape for shape in cost.inputs.values()):
        return "state the sizes that the file leaves open, as in input=1x3x640x640"
    return "they depend on values that only a run knows, or nobody counts these operators"


def _say(console: "Console", text: str) -> None:
    """Print a line, whatever names are in it."""
    console.print(text, markup=False, soft_wrap=True, highlight=False)


def _file_latency(path: Path, runs: int, cost: "Cost[int | None]") -> dict[str, float]:
    import torch

    from archnet.deploy import load_session
    from archnet.deploy.latency import latencies

    inputs = load_session(path, threads=1).get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        raise ArchnetError(f"{path}: latency is measured for files with one float input")
    shape = [size or 1 for size in cost.inputs[inputs[0].name]]
    return latencies({path.name: path}, torch.zeros(shape), runs)


Layer = tuple[str, str, Sequence[Sequence["StepCost"]]]


def _layers(teacher: "Cost", student: "Cost") -> list[Layer]:
    """(module path in the teacher, student's operators, teacher's steps, student's steps)."""
    paths = list(dict.fromkeys(step.origin for step in student.steps))
    place = 0
    for step in teacher.steps:
        if step.origin in paths:
            place = paths.index(step.origin) + 1
        else:
            # A module that left no step, such as a batch norm folded into its convolution.
            paths.insert(place, step.origin)
            place += 1
    found: list[Layer] = []
    for path in paths:
        sides = [[s for s in side.steps if s.origin == path] for side in (teacher, student)]
        operators = dict.fromkeys(step.operator for step in sides[1])
        found.append((path or "(no module)", ", ".join(operators), sides))
    return found


def _show(
    console: "Console",
    title: str,
    layers: Sequence[Layer],
    sides: Sequence[tuple[str, "Cost"]],
    array: "SystolicArray",
) -> None:
    from rich.table import Table
    from rich.text import Text

    from archnet.hardware import cycles
    from archnet.report.table import amount

    # Brackets in a path are no markup.
    table = Table(title=Text(title), title_justify="left", header_style="")
    table.add_column("layer", overflow="fold")
    table.add_column("operators", overflow="fold")
    for name, _ in sides:
        for column in COLUMNS:
            table.add_column(f"{name}\n{column}", justify="right")

    def cells(steps: Sequence["StepCost"]) -> list[str]:
        return [
            shown([step.macs for step in steps], sum, ""),
            shown([step.bops for step in steps], sum, ""),
            shown([step.weight_bytes for step in steps], sum, "B"),
            shown([step.live_bytes for step in steps], max, "B"),
            shown([cycles(step, array) for step in steps], sum, ""),
        ]

    def shown(figures: Sequence[int | None], combine: Callable[[list[int]], int], unit: str) -> str:
        known = [figure for figure in figures if figure is not None]
        return "unknown" if len(known) < len(figures) else amount(combine([0, *known]), unit)

    for name, operators, parts in _shortened(layers):
        table.add_row(
            name,
            operators,
            *(cell for steps in parts for cell in (cells(steps) if steps else [""] * 5)),
        )
    table.add_section()
    totals = []
    for _, cost in sides:
        totals += cells(cost.steps)[:3]
        peak = cost.activation_bytes
        totals.append("unknown" if peak is None else amount(peak, "B"))
        totals.append(cells(cost.steps)[4])
    table.add_row("in all; live: peak", "", *totals)
    console.print(table, markup=False)
    console.print(
        f"cycles: {array.rows}x{array.columns} systolic array, {array.dataflow} stationary, "
        f"{array.bandwidth:g} bytes a cycle on the chip; products only. "
        "live: activations in memory, bytes",
        markup=False,
        soft_wrap=True,
    )
    for name, cost in sides:
        total = sum(cycles(step, array) or 0 for step in cost.steps)
        if total and cost.macs is not None:
            busy = cost.macs / (total * array.rows * array.columns)
            console.print(f"  {name}: {total:,} cycles, multipliers busy {busy:.0%}", markup=False)
        if cost.uncounted:
            missing = ", ".join(
                f"{count:,} {printable(what)}" for what, count in cost.uncounted.items()
            )
            console.print(f"  {name}: not in these MACs: {missing}", markup=False, soft_wrap=True)


def _shortened(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The first layers, and one that stands for the rest where there are too many."""
    shown, rest = layers[:MOST_ROWS], layers[MOST_ROWS:]
    if not rest:
        return shown
    sides = zip(*(parts for _, _, parts in rest), strict=True)
    together = [[step for steps in side for step in steps] for side in sides]
    return [*shown, (f"{len(rest):,} more", "", together)]


def _show_latencies(console: "Console", found: dict[str, float]) -> None:
    from rich.table import Table

    table = Table(title="latency in ONNX Runtime, 1 thread, batch 1", title_justify="left")
    table.add_column("")
    table.add_column("median ms", justify="right")
    reference = found.get("student, float")
    if reference:
        table.add_column("times as fast as the float student", justify="right")
    for name, milliseconds in found.items():
        ratio = [f"{reference / milliseconds:.2f}"] if reference else []
        table.add_row(name, f"{milliseconds:.3f}", *ratio)
    console.print(table, markup=False)
