"""`archnet compare`: finished runs beside each other, accuracy over cost."""

import argparse
from pathlib import Path

from archnet.errors import ArchnetError, printable

HELP = "runs beside each other: a table, and accuracy over cost as a plot"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "runs", nargs="+", help="run folders, a multirun's folder, folders of runs, or patterns"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for comparison.html, .csv and .png; the one that is named, if it is one of "
        "runs, else the working directory",
    )


def run(options: argparse.Namespace) -> int:
    """Print tables and plots, write the files."""
    from archnet.report import comparison

    found = comparison.compare(comparison.find(options.runs))
    comparison.show(found)
    if not found.groups:
        raise ArchnetError("none of these runs is finished: there is nothing to compare")
    for path in comparison.write(found, options.output or _place(options.runs)):
        print(printable(path, None))
    return 0


def _place(given: list[str]) -> Path:
    only = Path(given[0])
    is_of_runs = len(given) == 1 and only.is_dir() and not (only / "config.yaml").is_file()
    return only if is_of_runs else Path()
