"""`archnet report`: a finished run's table and page, written anew."""

import argparse
from pathlib import Path

HELP = "print a run's table, write its report.html anew"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="run folder")


def run(options: argparse.Namespace) -> int:
    """Print the table and the path of the page."""
    from archnet import report
    from archnet.runs import RunFolder, read_json

    folder = RunFolder.open(options.run)
    report.show(read_json(folder.metrics), folder.path)
    print(report.write(folder.path))
    return 0
