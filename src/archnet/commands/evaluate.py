"""`archnet evaluate`: teacher and student of a finished run on the test data."""

import argparse
import json

from archnet.commands.folder import folder_arguments, open_folder

HELP = "teacher and student on the test data: accuracy, or BLEU and chrF"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the figures as JSON."""
    from archnet.jobs import conductor

    print(json.dumps(conductor.reevaluate(open_folder(options)), indent=2))
    return 0
