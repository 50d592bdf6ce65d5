"""`archnet audit`: judge an ONNX file, anybody's."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from archnet.commands.cost import INPUT_HELP
from archnet.errors import ArchnetError, printable

if TYPE_CHECKING:
    from archnet.hardware import Audit

HELP = "list what a target does not run in an ONNX file"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=Path, help="an ONNX file")
    parser.add_argument("--input", metavar="SHAPE", help=INPUT_HELP)
    parser.add_argument("--hardware", default="arch5", help="target (default: arch5)")


def run(options: argparse.Namespace) -> int:
    """Print the nodes outside the target, and those not judged, by operator and reason.

    Returns:
        1 if there are nodes outside the target, else 0: what the target's description does not
        mention is told, and counts as neither.
    """
    import archnet
    from archnet.hardware import grouped, input_shapes

    if not options.file.is_file():
        raise ArchnetError(f"{options.file} is not a file")
    given = input_shapes(options.input) if options.input is not None else None
    audit = archnet.audit(options.file, hardware=options.hardware, inputs=given)
    for title, findings in (("", audit.violations), ("not judged: ", audit.not_judged)):
        for (operator, reason), nodes in grouped(findings).items():
            print(f"{title}{printable(operator)}: {printable(reason)} ({len(nodes)})")
            for node in nodes:
                print(f"  {printable(node)}")
    print(f"{printable(options.file, None)}: {_verdict(audit)}")
    for note in audit.notes:
        print(f"note: {note}")
    return 0 if audit.pure else 1


def _verdict(audit: "Audit") -> str:
    from archnet.report.table import unjudged

    moves = sum(map(len, audit.moves.values()))
    counts = (
        f"{len(audit.violations)} nodes outside it, {sum(audit.counts.values())} inside, "
        f"{moves} layout moves"
    )
    rest = unjudged(audit.summary()["not_judged"]) if audit.not_judged else ""
    if audit.pure and rest:
        return f"pure under {audit.target} as far as judged: {rest}; {counts}"
    verdict = "pure" if audit.pure else "not pure"
    return f"{verdict} under {audit.target}: {counts}{', ' if rest else ''}{rest}"
