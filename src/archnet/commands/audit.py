"""`archnet audit`: judge an ONNX file, anybody's."""

import argparse
from pathlib import Path

from archnet.errors import ArchnetError

HELP = "list what a target does not run in an ONNX file"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=Path, help="an ONNX file")
    parser.add_argument("--hardware", default="arch5", help="target (default: arch5)")


def run(options: argparse.Namespace) -> int:
    """Print the violations; 1 if there are any."""
    import archnet

    if not options.file.is_file():
        raise ArchnetError(f"{options.file} is not a file")
    audit = archnet.audit(options.file, hardware=options.hardware)
    for violation in audit.violations:
        print(violation)
    print(f"{options.file}: {'pure' if audit.pure else 'not pure'} under {options.hardware}")
    return 0 if audit.pure else 1
