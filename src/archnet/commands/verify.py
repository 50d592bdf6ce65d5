"""`archnet verify`: a finished run's student in PyTorch and in every form, bit by bit."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from archnet.commands.folder import folder_arguments, open_folder
from archnet.errors import ArchnetError

HELP = "compare every form of a run's student with its golden integer model"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser)
    parser.add_argument(
        "--inputs", type=int, help="inputs to run (default: 2000; of a translator 200 sentences)"
    )
    parser.add_argument("--forms", help="forms, comma-separated (default: all that run here)")


def run(options: argparse.Namespace) -> int:
    """Print the table and write it to ``metrics.json``; 1 if a prediction changed."""
    from archnet.jobs import conductor
    from archnet.report.checks import checks_table
    from archnet.report.table import plain_console
    from archnet.runs import RunError, read_json

    if options.inputs is not None and options.inputs < 1:
        raise ArchnetError(f"inputs={options.inputs}: at least one is needed")
    folder = open_folder(options)
    job, student = conductor.reopen(folder)
    if not folder.metrics.is_file():
        raise RunError(f"{folder.metrics} is missing: finish the run with resume={folder.path}")
    read_json(folder.metrics, dict)
    forms = options.forms.split(",") if options.forms else None
    checks = job.verify(student, options.inputs, forms)
    inputs = max(check.inputs for check in checks)
    found = {"inputs": inputs, "checks": {check.name: check.summary() for check in checks}}
    conductor.add_finding(folder, "verify", found)
    plain_console().print(checks_table(folder.path.name, inputs, checks))
    for line in _doubts(path for path in job.files if path.is_file()):
        print(line)
    return 1 if any(check.changed or check.sentences_changed for check in checks) else 0


def _doubts(files: Iterable[Path]) -> list[str]:
    """A line for each tool that is known to compute one of these files wrongly."""
    import onnx

    from archnet.deploy import doubts

    return [
        f"{path.name}: {line}"
        for path in files
        for line in doubts(onnx.load(path, load_external_data=False)).values()
    ]
