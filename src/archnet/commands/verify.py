"""`archnet verify`: a finished run's student in PyTorch and in every form, bit by bit."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from archnet.commands.folder import folder_arguments, open_folder
from archnet.errors import ArchnetError

if TYPE_CHECKING:
    from archnet.deploy import Check

HELP = "compare every form of a run's student with its golden integer model"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser)
    parser.add_argument("--inputs", type=int, default=2000, help="inputs to run (default: 2000)")
    parser.add_argument("--forms", help="forms, comma-separated (default: all that run here)")


def run(options: argparse.Namespace) -> int:
    """Print the table and write it to ``metrics.json``; 1 if a prediction changed."""
    from archnet.deploy import verify
    from archnet.jobs import conductor
    from archnet.runs import RunError, read_json, write_json

    if options.inputs < 1:
        raise ArchnetError(f"inputs={options.inputs}: at least one is needed")
    folder = open_folder(options)
    job, student = conductor.reopen(folder)
    if not folder.metrics.is_file():
        raise RunError(f"{folder.metrics} is missing: finish the run with resume={folder.path}")
    read_json(folder.metrics, dict)
    images = job.inputs(options.inputs).numpy()
    forms = options.forms.split(",") if options.forms else None
    files = {folder.onnx.name: folder.onnx} if folder.onnx.is_file() else {}
    checks = verify(student, images, forms, files, cast(Any, job.config.hardware.requantization))
    with folder.locked():
        metrics = read_json(folder.metrics, dict)
        metrics["verify"] = {
            "inputs": len(images),
            "checks": {check.name: check.summary() for check in checks},
        }
        write_json(folder.metrics, metrics)
    _show(folder.path.name, len(images), checks)
    for line in _doubts(files.values()):
        print(line)
    return 1 if any(check.changed for check in checks) else 0


def _doubts(files: Iterable[Path]) -> list[str]:
    """A line for each tool that is known to compute one of these files wrongly."""
    import onnx

    from archnet.deploy import doubts

    return [
        f"{path.name}: {line}"
        for path in files
        for line in doubts(onnx.load(path, load_external_data=False)).values()
    ]


def _show(title: str, inputs: int, checks: "list[Check]") -> None:
    from rich.table import Table

    from archnet.report.table import plain_console

    table = Table(
        title=f"{title}: compared with the integer model on {inputs:,} inputs",
        title_justify="left",
        caption="steps off: largest difference of an output, in units of its accumulator\n"
        "bit-equal: outputs without a difference; changed: predictions",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("run by")
    for name in ("inputs", "steps off", "bit-equal", "changed"):
        table.add_column(name, justify="right")
    for check in checks:
        if not check.skipped:
            table.add_row(
                check.name,
                check.runtime,
                f"{check.inputs:,}",
                f"{check.max_steps:g}",
                percent(check.bit_equal),
                str(check.changed),
            )
    shown = plain_console()
    shown.print(table)
    for check in checks:
        if check.skipped:
            shown.print(f"{check.name}: skipped, it {check.skipped}")
        elif check.bit_equal < 1:
            first = check.first or "no step: it does not recur when every step is an output"
            shown.print(f"{check.name}: first difference at {first}")
            if check.hint:
                shown.print(f"{check.name}: {check.hint}")


def percent(share: float) -> str:
    """Never 100 % where one output differs."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.999):.3f} %"
