"""`archnet export`: write a finished run's student in another form."""

import argparse
from pathlib import Path

HELP = "write a finished run's student in another form"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--form", help="see archnet.deploy.FORMS (default: as the run did)")
    parser.add_argument("--output", type=Path, help="file (default: student_<form>.* there)")


def run(options: argparse.Namespace) -> int:
    """Print the path of the written file."""
    import archnet
    from archnet import pipeline
    from archnet.runs import RunFolder

    folder = RunFolder.open(options.run)
    form = options.form or pipeline.form(folder.config())
    output = options.output or folder.path / f"student_{form}.onnx"
    print(archnet.export(pipeline.load_student(folder), output, form=form))
    return 0
