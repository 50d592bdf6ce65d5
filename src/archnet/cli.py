"""The `archnet` command: what comes after training."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from archnet.errors import ArchnetError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: that of the process.

    Returns:
        The exit code: 0; 1 when an audit finds violations; 2 for errors, told in one line.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ArchnetError as error:
        print(f"archnet: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="archnet", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    audit = commands.add_parser("audit", help="list what a target does not run in an ONNX file")
    audit.add_argument("file", type=Path, help="an ONNX file")
    audit.add_argument("--hardware", default="arch5", help="target (default: arch5)")
    audit.set_defaults(command=_audit)

    export = commands.add_parser("export", help="write a finished run's student in another form")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("--form", help="float or qcdq (default: as the run did)")
    export.add_argument("--output", type=Path, help="file (default: student_<form>.onnx there)")
    export.set_defaults(command=_export)

    evaluate = commands.add_parser("evaluate", help="teacher and student on the test images")
    evaluate.add_argument("run", type=Path, help="run folder")
    evaluate.set_defaults(command=_evaluate)

    report = commands.add_parser("report", help="print a run's table, write its report.html anew")
    report.add_argument("run", type=Path, help="run folder")
    report.set_defaults(command=_report)
    return parser


def _audit(options: argparse.Namespace) -> int:
    import archnet

    if not options.file.is_file():
        raise ArchnetError(f"{options.file} is not a file")
    audit = archnet.audit(options.file, hardware=options.hardware)
    for violation in audit.violations:
        print(violation)
    print(f"{options.file}: {'pure' if audit.pure else 'not pure'} under {options.hardware}")
    return 0 if audit.pure else 1


def _export(options: argparse.Namespace) -> int:
    import archnet
    from archnet import pipeline
    from archnet.runs import RunFolder

    folder = RunFolder.open(options.run)
    form = options.form or pipeline.form(folder.config())
    output = options.output or folder.path / f"student_{form}.onnx"
    print(archnet.export(pipeline.load_student(folder), output, form=form))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from archnet import pipeline
    from archnet.runs import RunFolder

    print(json.dumps(pipeline.evaluate(*pipeline.reopen(RunFolder.open(options.run))), indent=2))
    return 0


def _report(options: argparse.Namespace) -> int:
    from archnet import report
    from archnet.runs import RunFolder, read_json

    folder = RunFolder.open(options.run)
    report.show(read_json(folder.metrics), folder.path)
    print(report.write(folder.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
