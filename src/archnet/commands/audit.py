"""`archnet audit`: judge an ONNX file, anybody's."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from archnet.commands.cost import INPUT_HELP
from archnet.errors import ArchnetError

if TYPE_CHECKING:
    from archnet.hardware import Audit

HELP = "list what a target does not run in an ONNX file"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=Path, help="an ONNX file")
    parser.add_argument("--input", metavar="SHAPE", help=INPUT_HELP)
    parser.add_argument("--hardware", default="arch5", help="target (default: arch5)")


def run(options: argparse.Namespace) -> int:
    """Print the nodes outside the target, by operator and reason; 1 if there are any."""
    import archnet
    from archnet.hardware import input_shapes

    if not options.file.is_file():
        raise ArchnetError(f"{options.file} is not a file")
    given = input_shapes(options.input) if options.input is not None else None
    audit = archnet.audit(options.file, hardware=options.hardware, inputs=given)
    for (operator, reason), nodes in audit.groups().items():
        print(f"{operator}: {reason} ({len(nodes)})")
        for node in nodes:
            print(f"  {node}")
    print(f"{options.file}: {_verdict(audit)}")
    for note in audit.notes:
        print(f"note: {note}")
    return 0 if audit.pure else 1


def _verdict(audit: "Audit") -> str:
    outside, inside = len(audit.violations), sum(audit.counts.values())
    moves = sum(map(len, audit.moves.values()))
    verdict = "pure" if audit.pure else "not pure"
    return (
        f"{verdict} under {audit.target}: {outside} nodes outside of it, {inside} inside, "
        f"{moves} layout moves"
    )
