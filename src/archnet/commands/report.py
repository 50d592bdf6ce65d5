"""`archnet report`: a finished run's table and page, written anew."""

import argparse

from archnet.commands.folder import folder_arguments, open_folder
from archnet.errors import printable

HELP = "print a run's table, write its report.html anew"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table and the path of the page."""
    from archnet import report
    from archnet.runs import read_json

    folder = open_folder(options)
    report.show(read_json(folder.metrics, dict), folder.path)
    print(printable(report.write(folder.path), None))
    return 0
