"""`archnet evaluate`: teacher and student of a finished run on the test images."""

import argparse
import json
from pathlib import Path

HELP = "teacher and student on the test images"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="run folder")


def run(options: argparse.Namespace) -> int:
    """Print the figures as JSON."""
    from archnet import pipeline
    from archnet.runs import RunFolder

    print(json.dumps(pipeline.evaluate(*pipeline.reopen(RunFolder.open(options.run))), indent=2))
    return 0
