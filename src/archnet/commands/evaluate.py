"""`archnet evaluate`: teacher and student of a finished run on the test data."""

import argparse
import json
from pathlib import Path

HELP = "teacher and student on the test data: accuracy, or BLEU and chrF"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="run folder")


def run(options: argparse.Namespace) -> int:
    """Print the figures as JSON."""
    from archnet import pipeline
    from archnet.runs import RunFolder

    print(json.dumps(pipeline.reevaluate(RunFolder.open(options.run)), indent=2))
    return 0
